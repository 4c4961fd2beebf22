"""A relay process: `python -m hemostat.relay.main`. It prints `{"loaded": true}` and reads its configuration, one line
of JSON, from its standard input:

    {"worker": 0, "fds": [7],
     "upstream": {"urls": ["http://127.0.0.1:8001"], "api_key": null, "ca": null, "max_connections": 512,
                  "affinity": true},
     "allow_adapter_routes": false, "control": {"path": "/run/…/control.sock"}, "figures": null,
     "shutdown_seconds": 30.0, "drain_seconds": 600.0,
     "limits": {"buffered_bytes": 134217728},
     "client_limits": {"key": "authorization", "requests_per_second": null, "burst": 10, "concurrent": null},
     "trusted_proxies": null,
     "log_level": "info", "log_format": "text", "log_requests": false,
     "access_log_fd": null, "access_log_clients": false, "other_fds": [],
     "tracing": {"endpoint": "http://collector:4318", "ratio": 0.01}}

control: see `ControlAddresses`. figures: a Unix socket that the counters are sent to as well; null: none. fds: the
inherited listening sockets. other_fds: inherited and not used: it was loaded before it was known which relay's
place it takes. It prints `{"listening": port}` when it accepts connections, and from then on that it is alive
(`ipc/liveness.py`). On SIGTERM it takes what waits in the queue, accepts no more connections, lets the requests in
progress end for `shutdown_seconds`, and exits with 0. Idle connections may send one more request, whose response closes
them. On SIGUSR1 another relay has taken its place: it does the same within `drain_seconds`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
from typing import Any

import uvloop

from hemostat import logs
from hemostat.interception.interceptor import Interceptor
from hemostat.ipc.addresses import ControlAddresses
from hemostat.ipc.liveness import beat
from hemostat.ipc.messages import OutcomeReport, Policy
from hemostat.ipc.relay_end import ControlLink
from hemostat.ipc.supervised import KILL_AFTER_SECONDS, end_after_supervisor, make_tracing
from hemostat.metrics import names
from hemostat.relay.access_log import AccessLog
from hemostat.relay.client_limits import ClientLimits
from hemostat.relay.counters import Counters
from hemostat.relay.forwarded_for import TrustedProxies
from hemostat.relay.limits import Limits, share_descriptors
from hemostat.relay.relay import REPLACED_IDLE_SECONDS, Relay
from hemostat.relay.upstreams.settings import UpstreamSettings

log = logging.getLogger("hemostat.relay")


class _End:
    """Owns what signals have asked for: to stop, or to drain because another relay has taken over."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.asked = asyncio.Event()
        self.stop = asyncio.Event()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, self._stop)
        loop.add_signal_handler(signal.SIGUSR1, self.asked.set)

    def _stop(self) -> None:
        self.stop.set()
        self.asked.set()


def _print(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)  # noqa: T201  the supervisor reads it


async def drain(relay: Relay, end: _End, shutdown_seconds: float, drain_seconds: float) -> bool:
    """Lets the requests in progress end; returns False if some have not. A relay that was replaced may be stopped
    meanwhile."""
    if not end.stop.is_set():
        draining = asyncio.create_task(relay.drain(drain_seconds, REPLACED_IDLE_SECONDS))
        stopping = asyncio.create_task(end.stop.wait())
        await asyncio.wait({draining, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if draining.done():
            return draining.result()
        draining.cancel()
    return await relay.drain(shutdown_seconds)


def _within_descriptors(config: dict[str, Any]) -> tuple[Limits, UpstreamSettings]:
    """Returns the clients' limits and the engines with their connections, as far as this process may open files."""
    networks = config.get("trusted_proxies")
    limits = Limits(
        **config.get("limits", {}),
        adapter_routes=config.get("allow_adapter_routes", False),
        trusted_proxies=None if networks is None else TrustedProxies(networks),
    )
    upstream = UpstreamSettings.from_json(config["upstream"])
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if descriptors == resource.RLIM_INFINITY:
        return limits, upstream
    engines = len(upstream.urls)
    clients, shared = share_descriptors(descriptors, limits.connections, upstream.max_connections * engines)
    connections = max(shared // engines, 1)
    if (clients, connections) != (limits.connections, upstream.max_connections):
        log.warning(
            "relay %d: at most %d connections of clients and %d to each engine, because it may open %d files only; "
            "raise the limit (ulimit -n)",
            config["worker"],
            clients,
            connections,
            descriptors,
        )
    # In proportion, so that one client still cannot use up all connections where it could not before.
    per_client = max(limits.connections_per_client * clients // limits.connections, 1)
    limits = dataclasses.replace(limits, connections=clients, connections_per_client=per_client)
    return limits, dataclasses.replace(upstream, max_connections=connections)


async def run(config: dict[str, Any]) -> None:
    """Serves until SIGTERM, SIGINT or SIGUSR1, then lets the requests in progress end."""
    loop = asyncio.get_running_loop()
    end = _End(loop)

    counters, access_log = Counters(), None
    if config.get("access_log_fd") is not None:
        access_log = AccessLog(
            config["access_log_fd"],
            config["log_format"],
            lambda lines: counters.add(names.ACCESS_LOG_DROPPED_LINES, (), lines),
            clients=config["access_log_clients"],
        )
    client_limits = ClientLimits(**config.get("client_limits", {}))

    def report_outcome(report: OutcomeReport) -> bool:
        return link.report_outcome(report)

    limits, upstream = _within_descriptors(config)
    relay = Relay(
        upstream,
        limits=limits,
        counters=counters,
        tracing=make_tracing(config.get("tracing")),
        log_requests=config.get("log_requests", False),
        report_outcome=report_outcome,
        access_log=access_log,
        client_limits=client_limits if client_limits.enabled else None,
    )
    interceptor: Interceptor | None = None

    def on_policy(policy: Policy | None) -> None:
        nonlocal interceptor
        if policy is None:
            relay.hook = None
            return
        if interceptor is None:
            interceptor = Interceptor(policy, link.emit, relay.counters.add, sampled=link.sampled.update)
        interceptor.policy = policy
        relay.upstreams.set_drained(policy.drained)
        relay.hook = interceptor

    worker = config["worker"]
    link = ControlLink(ControlAddresses.from_json(config["control"]), worker, on_policy, relay.stats)
    links = [link]
    if config.get("figures"):
        links.append(ControlLink(ControlAddresses(config["figures"]), worker, lambda _: None, relay.stats, quiet=True))
    for fd in config.get("other_fds", ()):
        os.close(fd)
    sockets = [socket.socket(fileno=fd) for fd in config["fds"]]
    await relay.serve(*sockets)
    linking = [loop.create_task(link.run()) for link in links]
    # Objects that exist now are kept until the end: the garbage collector need not traverse them again.
    gc.collect()
    gc.freeze()
    _print({"listening": sockets[0].getsockname()[1]})
    linking.append(loop.create_task(beat()))
    await end.asked.wait()
    for linked in links:
        linked.report()
    if not await drain(relay, end, config["shutdown_seconds"], config.get("drain_seconds", 0.0)):
        log.warning(
            "relay %d: %d requests were still in progress when the time to drain was over",
            config["worker"],
            relay.busy,
        )
    for task in linking:
        task.cancel()
    await asyncio.gather(*(link.close() for link in links))
    await relay.close()
    if relay.tracing is not None:
        await asyncio.to_thread(relay.tracing.close)


def main() -> int:
    """Runs a relay; returns the exit code, 0 after an orderly stop, 1 if it cannot start."""
    watch = end_after_supervisor()
    _print({"loaded": True})
    if not (line := sys.stdin.readline()):
        return 0  # the supervisor has ended before it sent anything
    config = json.loads(line)
    watch.grace_seconds = config["shutdown_seconds"] + KILL_AFTER_SECONDS
    logs.set_up(config.get("log_level", "info"), config.get("log_format", "text"))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        uvloop.run(run(config))
    except (OSError, ValueError) as error:
        log.error("relay %d cannot start: %s", config["worker"], error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
