"""From a sampled request to a token record: interception, limits, scoring.

The modules, in the order of a request:

    In a relay:

        interceptor             the hook: decides by a request's head
        client_headers          what the client asks for in X-Hemostat headers
        assignment              what is drawn, the names of conversations and clients, and the control arm
        intercepted_exchange    one request and its response: rewritten, and its tokens captured
        profile_choice          which profile and arm a request gets
        reports                 captures and counts, on their way to the control process
        refusals                what upstreams do not accept, and for how long it is not tried

    In the control process:

        pipeline                from a capture to all users of the scored record
        limits                  back-pressure: queue, token budget, circuit breaker
        scorer                  scores captures on the reference
        record_builder          capture, tap and scores as one validated record
        endings                 how sampled requests and captures end, and why
        noise_floor             each model against itself
        records_file            `records.path`

CONTRIBUTING.md follows one request from the relay to the metrics.
"""
