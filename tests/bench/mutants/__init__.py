"""Measures if the tests find changes of the product: `make bench-mutants`.

mutations      small changes of a source file: an operator, a condition, a number, a statement that is left out
recording      a pytest plugin: which lines each test executes, child processes included, and how long it takes
executed       runs the tests once with the plugin, file by file, and finds the tests of a line
tree           a checkout in which sources are changed and tests run
reversals      the last commits that mended a defect, and what remains of each if it is reversed
"""
