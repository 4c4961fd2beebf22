"""The ends of requests in a relay: values of the label `outcome` of its requests."""

from __future__ import annotations

from typing import Final

OK: Final = "ok"
"""The response is complete, and has a status below 400."""
CLIENT_ERROR: Final = "client_error"
"""The response is complete, and has the upstream's status 4xx."""
SERVER_ERROR: Final = "server_error"
"""The response is complete, and has the upstream's status 5xx."""
REFUSED: Final = "refused"
"""The request was answered with an error of our own that is the client's fault, or with the hook's refusal."""
OVERLOADED: Final = "overloaded"
"""The request was answered with 503, since a limit of the relay was reached."""
UPSTREAM_FAILED: Final = "upstream_failed"
"""The upstream could not be reached, closed the connection early or sent an invalid response; or the hook failed in the
middle of a response that cannot go on without it."""
CLIENT_GONE: Final = "client_gone"
"""The client closed the connection before its response was complete."""
FAILED: Final = (SERVER_ERROR, UPSTREAM_FAILED)
"""The endings at which clients got an error that is the upstream's."""
OUTCOMES: Final = (OK, CLIENT_ERROR, SERVER_ERROR, REFUSED, OVERLOADED, UPSTREAM_FAILED, CLIENT_GONE)
