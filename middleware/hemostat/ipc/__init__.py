"""Messages and framing between Hemostat's own processes.

addresses       the addresses where relays find control processes
child_process   both ends of a child process: messages over its standard input and output
control_end     the control process's end of its relays' connections
ends            the ends of requests in a relay: values of the label `outcome` of its requests
framing         frames on a stream of bytes: 4 bytes of length, big-endian, then that many bytes
http_bodies     bodies of HTTP answers, read with a bound: one piece for every client of ours
liveness        tells parents if their processes still work
messages        messages between relays and the control process
origin          the address of an engine, and the engines behind one name
relay_end       a relay's end of its connection to the control process
relay_listener  the control process's listening sockets
relay_samples   the samples of what all relays have counted
sampled         counts, in a relay, the sampled requests that never became a capture, until the counts are sent
supervised      the parts that processes need which a supervisor, or another parent, has started
supervisor      keeps a child process running for what its owner works on
turns           the turns of heavy jobs, so that few of them take cores at a time
"""
