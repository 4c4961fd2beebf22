"""Which kinds of traffic are followed by themselves."""

from __future__ import annotations

from collections.abc import Callable

from hemostat.ipc.messages import REST_KIND
from hemostat.profiles.followed_kinds import FollowedKinds


def made(
    limit: int,
    on_followed: Callable[[str], None] = lambda _: None,
    on_evicted: Callable[[str], None] = lambda _: None,
    keep: Callable[[], set[str]] = set,
) -> FollowedKinds:
    kinds = FollowedKinds(limit, lambda: 0.0, keep)
    kinds.on_followed, kinds.on_evicted = on_followed, on_evicted
    return kinds


def test_kinds_beyond_the_limit_and_requests_without_one_are_pooled() -> None:
    kinds = made(2)
    result = [kinds.update(kind) for kind in ("chat", "", "code", "json", "chat", REST_KIND)]
    assert result == ["chat", REST_KIND, "code", REST_KIND, "chat", REST_KIND]
    assert kinds.followed == {"chat", "code"}


def test_a_kind_that_loses_its_place_is_reported() -> None:
    followed: list[str] = []
    evicted: list[str] = []
    kinds = made(1, on_followed=followed.append, on_evicted=evicted.append)
    for kind in ["chat", *["code"] * 60]:
        kinds.update(kind)
    assert (followed, evicted) == (["chat", "code"], ["chat"])
    assert kinds.followed == {"code"}


def test_a_kind_that_must_be_kept_does_not_lose_its_place() -> None:
    kinds = made(1, keep=lambda: {"chat"})
    for kind in ["chat", *["code"] * 60]:
        kinds.update(kind)
    assert kinds.followed == {"chat"}
