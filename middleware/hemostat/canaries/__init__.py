"""Canaries: the same token sequences on every engine again, in the control process and by hand (`hemostat canaries`)."""
