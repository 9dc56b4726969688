"""Cores and memory that this process may use, by its cgroup's limits rather than the host's.

Knows files of the kernel. Knows nothing of models.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def cores(root: Path = CGROUP) -> int:
    """CPU cores this process may use: its affinity, bounded by the cgroup's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (root / "cpu.max").read_text().split()  # version 2
    except (OSError, ValueError):  # version 1, or none
        quota = _number(root / "cpu/cpu.cfs_quota_us") or "max"
        period = _number(root / "cpu/cpu.cfs_period_us") or "100000"
    return allowed if quota == "max" else max(1, min(allowed, math.ceil(int(quota) / int(period))))


def memory_left(root: Path = CGROUP) -> int:
    """Bytes that can still be allocated: the host's free memory, or less if the cgroup limits it."""
    left = psutil.virtual_memory().available
    for limit, used, cache in (
        ("memory.max", "memory.current", "memory.stat"),  # version 2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),  # version 1
    ):
        bound, taken = _number(root / limit), _number(root / used)
        if bound is not None and taken is not None:
            left = min(left, int(bound) - int(taken) + _reclaimable(root / cache))
    return max(0, left)


def _number(path: Path) -> str | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return text if text.isdigit() else None


def _reclaimable(path: Path) -> int:
    """Page cache that the kernel reclaims first."""
    try:
        rows = dict(line.split() for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(rows.get("inactive_file", 0))
