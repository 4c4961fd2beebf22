"""The data path: an HTTP/1.1 proxy at protocol level, between clients and one upstream server."""
