"""Where profiles, events and state are kept: in memory or SQLite."""
