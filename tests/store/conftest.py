"""The stores that tests here run on."""

from tests.support.store_fixtures import server, url

__all__ = ["server", "url"]
