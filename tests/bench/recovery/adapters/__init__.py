"""The family `adapter` in the benchmark of recovery: `make bench-recovery ARGS="--only adapters"`."""
