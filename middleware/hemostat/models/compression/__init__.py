"""`hemostat compress`: compressed copies of a checkpoint, made one decoder layer at a time."""
