"""How profiles are learned from token records."""
