"""`hemostat doctor --sweep`: one model at many settings of compression, structure and decoding, and its thresholds."""
