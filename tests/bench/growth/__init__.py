"""How time and memory of each part grow: `make bench-growth`."""
