"""The learning of profiles from token records.

contextual                learning contextual profiles: a map from hidden states to logit shifts
protocol                  the contract of learners: `init`, `update`, `propose`, all pure
temperature_bias          the learner of the temperature-and-bias family
temperature_bias_storage  stores what temperature and bias were learned from as bytes, for a restart
"""
