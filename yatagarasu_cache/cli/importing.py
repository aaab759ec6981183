"""`import-diskcache`: takes over what diskcache has stored."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from .opening import NO, OK
from .show import human_size, presenter, print_json

if TYPE_CHECKING:
    from ..compat.diskcache.importer import ImportReport

__all__ = ["run_import_diskcache"]


def run_import_diskcache(args: argparse.Namespace) -> int:
    from ..compat.diskcache.importer import import_diskcache  # with a database's code, for this command alone

    named = {"size_limit": args.size_limit, "eviction": args.eviction}
    settings = {name: value for name, value in named.items() if value is not None}
    try:
        with presenter().counting("entries") as progress:
            report = import_diskcache(
                args.source, args.cache, allow_pickle=args.allow_pickle, json_disk=args.json_disk,
                overwrite=args.overwrite, progress=progress, backend=args.backend, **settings,
            )  # fmt: skip
    except KeyboardInterrupt:
        presenter().note("interrupted: what was imported stays; begin it again, and it goes on")
        raise
    if args.json:
        print_json(_as_dict(report))
    else:
        _print(report)
    return OK if report.is_complete else NO


def _as_dict(report: ImportReport) -> dict[str, Any]:
    found = {one.name: getattr(report, one.name) for one in fields(report)}  # asdict makes no Counter anew
    return {**found, "left_out": dict(report.left_out)}


def _print(report: ImportReport) -> None:
    rate = report.imported / max(report.seconds, 1e-9)
    print(
        f"{report.imported} of {report.total} entries imported ({human_size(report.bytes)}, {rate:.0f}/s); "
        f"{report.present} were there already, {report.expired} had expired, "
        f"{sum(report.left_out.values())} left out"
    )
    for reason, count in report.left_out.most_common():
        print(f"  {count} left out: {reason}, for example {', '.join(report.examples[reason])}")
    for place, why in report.damaged.items():
        print(f"  {place} could not be imported: {why}")
    if report.evicted:
        print(
            f"  {report.evicted} were evicted meanwhile: the size limit of the cache is too small for all of "
            "them; give a larger --size-limit, and begin again"
        )
    for place in report.others:
        print(f"  {place} is a cache of its own: import it by itself")
