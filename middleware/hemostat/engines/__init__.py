"""The reports of the engines' plugins, the routes that they call, and which engine answers at which address.

addresses        finds out which of the engines that report answers at which address
answer_buffer    whole answers of tapped requests
api              the routes that the engine plugin calls on the admin port
configured       the addresses of engines that the control process may contact, by its own configuration
messages         the messages of the engines' plugins
registry         keeps which engines report, which profiles every rank holds, and the engines' counters
request_secrets  the secrets under which requests that make the engine's plugin act are signed
                 (`hemostat_calibration.engine_keys`)
served_weights   the weights that are compared with the reference now, by what the engines' plugins report
taps             the numbers of tapped requests, from when the engine sends them until the scorer takes them
upstreams        the engines that relays send requests to
"""
