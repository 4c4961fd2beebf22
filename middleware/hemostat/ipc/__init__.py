"""Messages and framing between Hemostat's own processes."""
