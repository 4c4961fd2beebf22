"""`hemostat doctor --sweep`: one model at many settings of compression, structure and decoding, and its thresholds.

alterations  what a point does to a model in memory: to its weights, its layers and its decoding
analysis     thresholds, the paper's statements and the Pareto front, and which points are measured on more texts
measuring    one loaded model at each point, over the same texts
outcomes     outcomes: prompts with known answers (`outcomes.jsonl`) and whether a response has them
page         the sweep's section of the HTML page, with its plots
points       the grid: what is done to the reference at each point, and the curves that the points form
report       the sweep as JSON values
results      what has been measured of each point so far, and its figures with intervals by request
run          the sweep: rungs of points, stored one by one, and the report
terminal     the sweep as terminal tables
"""
