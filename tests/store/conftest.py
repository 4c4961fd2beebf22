"""The stores that tests here run on."""

from tests.support.store_fixtures import url

__all__ = ["url"]
