"""The parts of `hemostat score` and `hemostat report`, which score captures later than they were served.

stages      the stages of scoring, with one reference and no profiles
folder      scores the segments of a folder, each into a file of the same name
evidence    the figures of scored rows, which the live code computes
summary     the report: lines, JSON, a page
"""
