"""The control process: composition of all that is not in the request path.

compared_models   the models that are compared now: who is told when they change, and what is forgotten then
composition       the parts of the control process, made and connected
learning          tells the learner what to learn about; what scoring and outcomes need of the profiles
model_identity    the identity of the models that stored evidence is about
operator_actions  the actions of operators through the admin port
ownership         the ownership of the store
policy            what relays act by: its parts, of which change it is made anew, and when it is sent
process           the control process: owns the shadow queue, the reference, the statistics, the calibrator
steady_clock      the time of the control process, on which all evidence relies (`hemostat_calibration.elapsed`)
stored_state      hands what an earlier run has stored to its owners
"""
