"""Which kinds of traffic are followed by themselves."""

from __future__ import annotations

from hemostat.ipc.messages import REST_KIND
from hemostat.profiles.kinds import Kinds
from hemostat.store.lease import Lease


def test_kinds_beyond_the_limit_and_requests_without_one_are_pooled() -> None:
    kinds = Kinds(2, Lease(shared=False), lambda _: None)
    found = [kinds.see(kind) for kind in ("chat", "", "code", "json", "chat", REST_KIND)]
    assert found == ["chat", REST_KIND, "code", REST_KIND, "chat", REST_KIND]
    assert kinds.followed == {"chat", "code"}


def test_a_kind_that_loses_its_place_is_reported() -> None:
    evicted: list[str] = []
    kinds = Kinds(1, Lease(shared=False), evicted.append)
    for kind in ["chat", *["code"] * 60]:
        kinds.see(kind)
    assert evicted == ["chat"]
    assert kinds.followed == {"code"}


def test_a_replica_that_does_not_lead_follows_no_kind_by_itself() -> None:
    lease = Lease(shared=True)
    kinds = Kinds(2, lease, lambda _: None)
    assert kinds.see("chat") == REST_KIND
    lease.grant(float("inf"))
    assert kinds.see("chat") == "chat"
