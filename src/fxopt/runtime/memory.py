"""Peak memory, measured by the system and not estimated."""

from __future__ import annotations

from pathlib import Path
import resource
import sys

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def reset_peak(device: torch.device | None = None) -> bool:
    """Starts a new peak measurement and says whether that worked.

    On a CUDA device it resets the allocator's counter. On Linux it sets the process's high-water mark to what is
    resident now. Elsewhere the mark cannot be reset: False, and `peak_bytes` then counts since the process began.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device | None = None) -> int:
    """Peak since the last successful `reset_peak`, in bytes.

    On a CUDA device: what the allocator held at most. Otherwise: the most resident memory of the process (VmHWM on
    Linux, `ru_maxrss` since the process began elsewhere).
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _status("VmHWM")
    if peak is None:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak


def resident_bytes() -> int | None:
    """Resident memory of this process now, in bytes; None where the system does not tell."""
    return _status("VmRSS")


def available_bytes(device: torch.device | None = None) -> int | None:
    """What may still be allocated: on a CUDA device what is free and what the allocator holds unused; else the system's estimate for
    new programs. None where the system does not tell."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _status(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


class Allocations:
    """Inside, the tensor memory that is allocated is counted: `peak` is the most that was in use above the beginning, in bytes.

    On a CPU the allocator's events are recorded by torch's profiler, which slows small operations down; scratch memory that libraries
    get elsewhere is not seen. On a CUDA device it is the allocator's own counter.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device if device is not None and device.type == "cuda" else None
        self.peak = 0

    def __enter__(self) -> Allocations:
        if self.device is not None:
            self._before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device is not None:
            self.peak = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._profile.__exit__(*error)
        events = [(e.start_ns(), e.nbytes()) for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        now = 0
        for _, size in sorted(events, key=lambda event: event[0]):
            now += size
            self.peak = max(self.peak, now)
