"""Which machine, which versions, which day: written into every record."""

from __future__ import annotations

from datetime import date
from importlib.metadata import PackageNotFoundError, version
import os
from pathlib import Path
import platform
import subprocess
from typing import Any

import torch

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lightning")


def describe() -> dict[str, Any]:
    """CPU, cores, memory, the vector units that matter, versions, the date and the commit."""
    info = _cpuinfo()
    flags = info.get("flags", "").split()
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "units": [flag for flag in _FLAGS if flag in flags],
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "date": date.today().isoformat(),
        "commit": _commit(),
    }


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _commit() -> str | None:
    """Of the repository that this file lies in, with a + if tracked files differ from it; None outside of one."""
    try:
        where = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": True}
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **where).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no", "../src"], **where).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return found + "+" * bool(changed)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
