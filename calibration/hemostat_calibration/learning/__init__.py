"""The learning of profiles from token records."""
