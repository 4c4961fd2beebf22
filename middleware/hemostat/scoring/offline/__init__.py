"""The scoring of captures later than they were served: `hemostat score`, `hemostat report`, a window of `spool.score`.

stages      the stages of scoring, with one reference and no profiles
lines       captures from a file of JSON lines
folder      scores the segments of a folder, each into a file of the same name
left_out    what of a folder is not in the figures
on_ray      the same on the machines of a Ray cluster
evidence    the figures of scored rows, which the live code computes
summary     the report: lines, JSON, a page
window      scores the spool of a control process in certain hours
evidence_time  the time of the requests that were scored then
"""
