"""Where profiles, events and state are kept: in memory, SQLite or Valkey."""
