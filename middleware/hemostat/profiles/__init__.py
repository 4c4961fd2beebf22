"""The life of calibration profiles: proposed, tested, promoted, rolled back.

What each module owns:

    manager             the parts, composed for the control process
    proposals           what was learned, and when a profile is proposed
    judging             evidence of held-out requests: what counts, and what follows
    futility            when a test is hopeless, so that another candidate may take its place
    candidates          what is to be tested, and where it comes from
    gains               the figure that gains of a profile over another are in, and how wide they can be
    trials              the queue of candidates and the state of the tests; `guard_keys`: how the guard names them
    begun_tests         the numbers of tests, which are stored before these decide
    paces               how fast the units of a test come
    lifecycle           the steps: test, promote, roll back, drop
    serving             which version serves which kind of traffic
    followed_kinds      which kinds are followed by themselves
    operators           what an operator decides
    catalogue           the profiles held
    decisions           the log of events
    persistence         what the store keeps; `restoring` reads it back
    report              what is shown

Calls go one way: restoring, report, operators -> proposals, judging -> lifecycle -> the parts that hold state.

Where something new goes, of this package (a family has parts in other packages, too: CONTRIBUTING.md lists them all):

    a family            nothing: `hemostat_calibration.profiles.families` has its rules, and its learner calls
                        `Proposals.accepts` and `propose`
    an evidence unit    `TokenRecord.unit`, from which both the split and the counting follow
    a decision, reason  `decisions.REASONS`, explained in deploy/metrics.py
"""
