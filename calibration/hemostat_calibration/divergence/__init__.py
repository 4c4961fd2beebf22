"""Divergences between two models on the same tokens.

bounds            bounds that top-K lists prove
convex            lower bounds of convex functions on an interval, by cutting planes
decoding          the distributions that tokens were drawn from
gain              the gain of a profile at each position: KL(r‖c) − KL(r‖c'), as an interval
per_token         divergences of the compressed model c from the reference r, token by token
places            a request's figures by where its tokens stand
profile_shift     the change that a profile makes to a record
sampled_estimate  estimates of KL from the emitted token, without truncation bias
together          the figures of several requests, computed together
trajectory        the length over which two models generate the same text
view              both models' values from a record, side by side
"""
