"""Streaming estimators, and intervals and tests that are valid at every look.

confidence     confidence sequences: intervals for all times together, whenever one looks
continuations  recognition of requests that go on with an earlier one
dependence     the dependence of units on each other
kind_table     the kinds of traffic that are followed by themselves
mean_table     means of many figures of the same requests, updated together
running_mean   confidence sequences of running means that hold for every number of observations
split          the split into learning and held-out requests by a key alone
streaming      estimators in constant memory
templates      clusters of alike prompts
two_arms       a test if an outcome is more frequent in a treated arm than in a control arm
"""
