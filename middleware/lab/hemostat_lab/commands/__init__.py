"""The commands of the laboratory. `hemostat` finds them by their entry points."""
