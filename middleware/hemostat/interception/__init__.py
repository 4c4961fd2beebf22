"""In a relay, what the hook of `hemostat.hooks` does: sampling, profiles, and what is captured of sampled requests.

The modules, in the order of a request:

    interceptor             the hook: decides by a request's head
    client_headers          what the client asks for in X-Hemostat headers
    assignment              what is drawn, the names of conversations and clients, and the control arm
    intercepted_exchange    one request and its response: rewritten, and its tokens captured; its states: capture_state
    intercepted_response    the response to a rewritten request; its states: response_state
    model_list              the answer to GET /v1/models, without Hemostat's own adapters
    profile_choice          which profile and arm a request gets
    reports                 captures and counts, on their way to the control process
    refusals                what upstreams do not accept, and for how long it is not tried

What becomes of a capture: `hemostat.scoring`.
"""
