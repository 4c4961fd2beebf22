"""Streaming figures of the scored requests, in groups; the alarms on them."""
