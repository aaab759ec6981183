"""The machine and the versions that a report is about. No names, no paths."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version


def describe(directory: str) -> dict[str, str]:
    return {
        "kernel": f"{platform.system()} {platform.release().split('-')[0]}",
        "CPU": f"{_cpu_model()}, {os.cpu_count()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "disk": _disk(directory),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "built": _built(),
        "packages": ", ".join(filter(None, map(_version, PACKAGES))),
        "tools": ", ".join(filter(None, map(_tool, ("fio", "strace", "valgrind")))),
    }


PACKAGES = (
    "xxhash", "ormsgpack", "cffi", "diskcache", "diskcache-community", "lmdb", "rocksdict", "caio", "aiofile",
)  # fmt: skip


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def _tool(name: str) -> str:
    try:
        done = subprocess.run([name, "--version"], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    words = done.stdout.split("\n")[0].replace("-- version ", "").replace("fio-", "fio ")
    return words.replace("valgrind-", "valgrind ")


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def _disk(directory: str) -> str:
    """File system, kind of device and its queue's scheduler, of the file system of `directory`."""
    device = os.stat(directory).st_dev
    kind = ""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8") as file:
            for line in file:
                fields, _, rest = line.partition(" - ")
                if fields.split()[2] == f"{os.major(device)}:{os.minor(device)}":
                    kind = rest.split()[0]
        base = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
        base = base if os.path.isdir(f"{base}/queue") else f"{base}/.."
        name = os.path.basename(os.path.realpath(base))
        family = "virtio" if name.startswith("vd") else "NVMe" if name.startswith("nvme") else "SCSI or SATA"
        with open(f"{base}/queue/read_ahead_kb", encoding="ascii") as file:
            ahead = file.read().strip()
        return f"{kind} on {family}, read-ahead {ahead} KiB"
    except (OSError, IndexError):
        return kind or "unknown"


def _built() -> str:
    """Which compiled parts of the package are in use."""
    there = [name for name in ("_core", "_ring") if importlib.util.find_spec(f"yatagarasu_cache.{name}")]
    core = os.environ.get("YATAGARASU_CORE", "auto")
    return f"{' and '.join(there) or 'no compiled module'}; YATAGARASU_CORE={core}"
