"""The engines: one registry of them, the reports of their plugins, and the routes that the plugins call.

`registry` has an `Engine` (`engine`) for each address that relays send requests to. What another part of the control
process keeps of an engine is a part of it, and ends when it leaves: its canaries, its adapters, and which of the
plugins that report is its own (`identification`).

answer_buffer    whole answers of tapped requests
api              the routes that the engine plugin calls on the admin port
configured       the addresses of engines that the control process may contact, by its own configuration
direct           the health of the engines where no relay reports it
engine           one engine of the upstream, with all that the control process knows of it
identification   finds out which of the engines that report answers at an address
messages         the messages of the engines' plugins
passive          what plugins that sample requests themselves are told, and what they count
registry         which engines there are, from when each appears until it leaves; what they hold, and which are drained
reports          what plugins report, by boot id: the versions that every rank holds, counters, and the served weights
request_secrets  the secrets under which requests that make the engine's plugin act are signed
                 (`hemostat_calibration.engine_keys`)
taps             the numbers of tapped requests, from when the engine sends them until the scorer takes them
"""
