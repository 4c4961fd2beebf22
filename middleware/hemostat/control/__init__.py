"""The control process: composition of all that is not in the request path."""
