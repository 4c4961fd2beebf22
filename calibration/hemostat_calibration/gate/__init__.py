"""The verdict of a gate: may a candidate replace what serves? Pass, fail or undecided, with an error rate.

distance       how far a candidate is from what it is compared with, token by token
verdict        the tests of all questions and kinds, and what follows from them
live           the same tests on live traffic, whose units depend on each other
"""
