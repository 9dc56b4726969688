"""Decides whether a run's figures can be trusted: reasons why they measure the generator instead of the server."""

from __future__ import annotations

from dataclasses import dataclass

CPU_PERCENT = 80.0  # of one core, of the busiest generator process
LAG_SECONDS = 0.010


@dataclass(frozen=True)
class Conduct:
    """Behaviour of the generator. Lag and CPU are those of its worst process."""

    users_wanted: int
    users_most: int
    all_spawned: bool
    cpu_percent: float
    lag: float | None = None  # p99 in seconds; with few requests the maximum
    answers: int = 0


def reasons(conduct: Conduct) -> list[str]:
    """Reasons why this run's figures cannot be trusted; empty if they can."""
    found = []
    if not conduct.answers:
        found.append("no answer came back")
    if not conduct.all_spawned:
        found.append(f"only {conduct.users_most} of {conduct.users_wanted} users were started when the run ended: a "
                     "longer run (LOAD_SECONDS) or a higher LOAD_SPAWN_RATE")  # fmt: skip
    if conduct.cpu_percent > CPU_PERCENT:
        found.append(f"the load generator used {conduct.cpu_percent:.0f} % of a core, more than {CPU_PERCENT:.0f} %: "
                     "fewer users, or more LOAD_PROCESSES")  # fmt: skip
    if conduct.lag is not None and conduct.lag > LAG_SECONDS:
        found.append(f"requests started {conduct.lag * 1000:.1f} ms late (p99), more than {LAG_SECONDS * 1000:.0f} ms: "
                     "a lower LOAD_RATE, or more LOAD_PROCESSES")  # fmt: skip
    return found
