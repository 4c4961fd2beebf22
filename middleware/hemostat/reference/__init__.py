"""Reference models behind one protocol."""
