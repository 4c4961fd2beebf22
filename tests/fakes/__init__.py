"""Stand-ins for the engines that Hemostat talks to."""
