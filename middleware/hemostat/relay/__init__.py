"""The data path: an HTTP/1.1 proxy at protocol level, between clients and one upstream server.

The modules, in the order of a request:

    main                composes the process; `relay` is the relay: its socket, its connections, its drain
    context             what all connections of one relay share; `limits` is what a client may send
    client_identity     who a client is, for all that is limited or compared by client
    shares              how much each client holds of what all share; `request_budget` is what they share
    client_connection   one client's connection; `disconnect` notices clients that have gone
    http/               the rules of HTTP/1.1 on bytes
    exchange            one request and its response; `exchange_state` has the states, `fail_open` calls the hook
    forwarding          the head that goes upstream
    pool, upstream      connections to the upstream server
    response_framing    how the response's body is framed for the client; `tunnel` is a connection after a 101
    generation          what is reported of one generation: `outcomes`, the trace span, the log line
    counters            what the process counts

CONTRIBUTING.md follows one request from here to the metrics.
"""
