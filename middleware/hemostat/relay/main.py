"""A relay process: `python -m hemostat.relay.main`, its configuration as JSON on standard input.

    {"worker": 0, "host": "127.0.0.1", "port": 8000, "reuse_port": true, "fd": null,
     "upstream": {"urls": ["http://127.0.0.1:8001"], "api_key": null, "ca": null, "max_connections": 512,
                  "queue_seconds": 60.0, "health_seconds": 2.0, "resolve_seconds": 5.0, "affinity": true},
     "allow_adapter_routes": false, "control_socket": "/run/…/control.sock",
     "shutdown_seconds": 30.0, "limits": {"head_bytes": 65536, "header_count": 128, "body_bytes": 268435456},
     "log_level": "info", "log_format": "text", "log_requests": false,
     "tracing": {"endpoint": "http://collector:4318", "ratio": 0.01}}

Prints `{"listening": port}` when it accepts connections. With `fd` it listens on that inherited socket. On SIGTERM it
accepts no more connections, lets the requests in progress end, and exits with 0.
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
from hemostat.ipc.messages import OutcomeReport, Policy
from hemostat.ipc.process import die_with_parent, make_tracing
from hemostat.ipc.relay_end import ControlLink
from hemostat.relay.counters import Counters
from hemostat.relay.limits import Limits, share_descriptors
from hemostat.relay.upstreams.settings import UpstreamSettings
from hemostat.relay.worker import Relay
from hemostat.shadow.interceptor import Interceptor

log = logging.getLogger("hemostat.relay")


def listening_socket(config: dict[str, Any]) -> socket.socket:
    """The bound socket of the data port; OSError if it cannot be bound."""
    if config.get("fd") is not None:
        return socket.socket(fileno=config["fd"])
    host = config["host"]
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if config.get("reuse_port"):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((host, config["port"]))
    return sock


def _within_descriptors(config: dict[str, Any]) -> tuple[Limits, UpstreamSettings]:
    """The clients' limits and the engines with their connections, as far as this process may open files."""
    limits = Limits(**config.get("limits", {}))
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
    return dataclasses.replace(limits, connections=clients), dataclasses.replace(upstream, max_connections=connections)


async def run(config: dict[str, Any]) -> None:
    """Serve until SIGTERM or SIGINT, then let the requests in progress end."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, stop.set)

    def report_outcome(report: OutcomeReport) -> bool:
        return link.report_outcome(report)

    limits, upstream = _within_descriptors(config)
    relay = Relay(
        upstream,
        limits=limits,
        counters=Counters(),
        tracing=make_tracing(config.get("tracing")),
        log_requests=config.get("log_requests", False),
        report_outcome=report_outcome,
        allow_adapter_routes=config.get("allow_adapter_routes", False),
    )
    interceptor: Interceptor | None = None

    def on_policy(policy: Policy | None) -> None:
        nonlocal interceptor
        if policy is None:
            relay.hook = None
            return
        if interceptor is None:
            interceptor = Interceptor(policy, link.emit, relay.counters.add, sampled=link.sampled.add)
        interceptor.policy = policy
        relay.upstreams.set_drained(policy.drained)
        relay.hook = interceptor

    link = ControlLink(config["control_socket"], config["worker"], on_policy, relay.stats)
    sock = listening_socket(config)
    await relay.serve(sock)
    linking = loop.create_task(link.run())
    # Objects that exist now are kept until the end: the garbage collector need not traverse them again.
    gc.collect()
    gc.freeze()
    print(json.dumps({"listening": sock.getsockname()[1]}), flush=True)  # noqa: T201  the supervisor reads it
    await stop.wait()
    draining = loop.create_task(relay.drain(config["shutdown_seconds"]))
    link.report()
    if not await draining:
        log.warning(
            "relay %d: %d connections still had a request in progress when the time to shut down was over",
            config["worker"],
            len(relay.clients),
        )
    linking.cancel()
    await link.close()
    await relay.close()
    if relay.tracing is not None:
        await asyncio.to_thread(relay.tracing.close)


def main() -> int:
    """Exit code 0 after an orderly stop, 1 if it cannot start."""
    config = json.load(sys.stdin)
    logs.set_up(config.get("log_level", "info"), config.get("log_format", "text"))
    die_with_parent(os.getppid())
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
