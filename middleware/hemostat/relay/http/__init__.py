"""HTTP/1.1 as an intermediary has to implement it (RFC 9110, 9112): rules on bytes, without sockets, clock, randomness.

Heads are parsed here and not by llhttp: llhttp has a fixed list of methods, but a proxy must forward any token; and it
hides the raw bytes, which have to be forwarded unchanged and searched for anything that two parsers could read
differently. The rule for requests: whatever is ambiguous is refused with 400, so that no two servers can disagree about
where a message ends. A head is cut into lines; those that an intermediary must not forward are removed, all others stay
unchanged.

    errors    protocol errors, by whose fault they are, and the error responses that the relay itself sends
    fields    header fields: their syntax, which of them an intermediary has to interpret
    framing   the end of a body: Content-Length, the chunked coding, or the end of the connection
    request   parses and checks request heads
    response  parses and checks response heads
"""
