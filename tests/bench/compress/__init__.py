"""The modules of `make bench-compress`: each has NAME, `cases(bench)` and `musts()`."""
