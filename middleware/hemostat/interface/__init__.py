"""The public interface of `import hemostat`, for programs and notebooks. `hemostat.__init__` loads it when it is used.

comparison  `compare`: two models' log-probabilities as arrays
scoring     `score`: the captures of a spool, on a reference
reports     `Report`: the figures, as a table, a page, a plot
streaming   `ConfidenceSequence` and `DependenceEstimate`: one value after the other, in constant memory

docs/python.md has the examples.
"""
