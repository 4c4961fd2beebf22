"""Settings: their schema, how they are loaded, and how errors are explained."""
