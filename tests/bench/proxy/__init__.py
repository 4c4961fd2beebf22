"""Parts of `make bench-proxy`."""
