"""The forms of request and response that can be scored: a module for each (`protocol.Format`), all in `table`."""
