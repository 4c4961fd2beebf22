"""Canaries: the same token sequences on every engine again; `control` hourly, `hemostat canaries` by hand."""
