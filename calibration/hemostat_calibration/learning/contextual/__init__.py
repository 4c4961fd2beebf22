"""Learning contextual profiles: a map from hidden states to logit shifts.

anchors        chooses the anchor ids, whose logits together determine the hidden state best
basis          the basis in which maps are learned
choose         the held-out choice: between scales of a map, and between maps
examples       the examples that fitters learn from
export         the step from a map to the profile that an engine applies: ids that are seldom likely get a change of
               lower rank
fit_linear     fit the linear map: reduced-rank ridge regression on the sums
fit_lists      fit a map where either model is known by a list of ids only
fitter         the result of a fitter: the best map of its family
fold_sums      streaming sufficient statistics of the linear map, by fold
hidden_states  hidden states behind logits
learner        the learner of the contextual family
maps           maps, and changes of a map that leave what it computes as it is, or scale it
objective      the objective by which maps are judged
regression     reduced-rank ridge regression from sums alone
rows           tokens as the contextual learner keeps them
storage        stores what was learned as bytes, for a restart
"""
