"""`export`: the figures of caches for Prometheus, over HTTP, from one process beside those that use them."""

from __future__ import annotations

import argparse
import contextlib
import errno
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from .opening import OK, CommandError
from .show import presenter, reason
from .watching import Watched

__all__ = ["run_export"]

NEEDS = "this needs prometheus_client: pip install 'yatagarasu_cache[prometheus]'"
LOOK_EVERY = 10.0  # seconds: so nothing that was removed is kept open where nobody asks for figures


def run_export(args: argparse.Namespace) -> int:
    """Serves until Ctrl-C or SIGTERM."""
    try:
        from prometheus_client import CollectorRegistry, start_http_server

        from ..integrations.prometheus import WatchedCollector
    except ImportError:
        raise CommandError(NEEDS) from None
    watched = named(args.caches, args.name or [], args.backend)
    registry = CollectorRegistry()
    registry.register(WatchedCollector(lambda: [(one.name, one.look().stats) for one in watched]))
    with ended_by_signals() as ended:
        try:
            server, thread = start_http_server(args.port, args.host, registry)
        except OSError as error:
            raise CommandError(refused(args.host, args.port, error)) from error
        try:
            for one in watched:
                if trouble := one.look().trouble:
                    presenter().note(f"{one.name}: not there yet: {trouble}")
            presenter().note(f"serving http://{host_in_url(args.host)}:{server.server_port}/metrics")
            while not ended.wait(LOOK_EVERY):
                for one in watched:
                    one.look()
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
            for one in watched:
                one.close()
    return OK


def named(directories: list[str], names: list[str], backend: str) -> list[Watched]:
    """Each cache with its label: the names in their order, or its directory."""
    if names and len(names) != len(directories):
        counted = f"{len(directories)} caches and {len(names)} names"
        raise CommandError(f"there are {counted}: give one --name for each")
    watched = [Watched(place, names[n] if names else "", backend) for n, place in enumerate(directories)]
    labels = [one.name for one in watched]
    if len(set(labels)) < len(labels):
        raise CommandError("two caches have the same label: give them different ones with --name")
    return watched


def refused(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken by another program: choose another --port"
    return f"cannot serve on port {port} of {host}: {reason(error)}"


def host_in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


@contextlib.contextmanager
def ended_by_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set: ending so is what is meant, and no failure."""
    ended = threading.Event()

    def end(_: int, __: FrameType | None) -> None:
        ended.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
