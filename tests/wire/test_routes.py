"""The route table: its paths are unique, and the lookups derived from it agree with each other."""

from __future__ import annotations

from hemostat.openai import routes
from hemostat.openai.routes import CHAT, COMPLETIONS, MESSAGES, OTHER, RESPONSES, ROUTES, Support


def test_paths_are_unique() -> None:
    paths = [route.path for route in ROUTES]
    assert len(set(paths)) == len(paths)
    assert OTHER not in paths


def test_scored_routes_have_a_label_and_an_operation() -> None:
    scored = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)
    assert routes.SCORED == scored == tuple(routes.FORMS)
    assert set(routes.OPERATIONS) == set(routes.SCORED) <= set(routes.LABELS.values())
    assert {path for path, support in routes.SUPPORT.items() if support is Support.SCORED} == {
        path.encode() for path in scored
    }
