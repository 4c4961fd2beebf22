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
    client_response     the response as the client gets it; `tunnel` is a connection after a 101
    generation          what is reported of one generation: `outcomes`, the trace span, the log line
    counters            what the process counts

CONTRIBUTING.md follows one request from here to the metrics.

Further modules:

    access_log        the access log: one line for each request on the data port, refused ones too
    answer_format     the form in which a client asked for an answer (JSON, tool calls), and whether an answer has
                      it
    answers           the content of a response, whatever its form
    client_limits     the limits of one client at this relay process
    client_side       a client's connection, as its exchanges see it
    forwarded_for     the address of a client behind proxies, as trusted ones say it
    outgoing_request  one request on its way upstream
    request_watch     checks a request's client limits when it begins, and writes the access log when it ends
    schema_check      checks if a JSON value fits a JSON schema that a client sent, in a bounded number of steps
    turns             limits how long one client may hold a relay's event loop: its turns
    upstreams         the engines behind one relay
"""
