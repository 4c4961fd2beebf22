"""Reference models behind one protocol. It imports nothing: workers, which need no configuration, start sooner."""
