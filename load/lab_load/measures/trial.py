"""One run in one process: settings, next requests, records. Knows nothing of HTTP or Locust."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ..settings import Settings
from ..workloads.arrivals import arrivals
from ..workloads.workload import WORKLOADS, Item, Workload
from .prefix import SharedPrefix
from .record import Record

# Two readings on one machine differ by less: its times are not touched.
SAME_CLOCK_SECONDS = 0.001

Timed = list[tuple[float, Item]]  # seconds after the start of the run, request


@dataclass(frozen=True)
class Target:
    """`status`: the proxy's /status, else the model service's /ready, with versions, models, device; else empty."""

    host: str
    model: str | None  # None: the endpoints choose a model
    server: str = ""
    status: dict[str, Any] = field(default_factory=dict)
    page_tokens: int | None = None  # of the model's prefix cache; None if the model does not report it


@dataclass
class Trial:
    """Times are seconds of `time.perf_counter`, which all processes of a machine share; `started` is UTC.

    The generator with number `index` of N sends every N-th group of the workload.
    """

    name: str
    settings: Settings
    target: Target
    workloads: dict[str, Workload]
    salt: str = ""
    index: int = 0
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    began: float = field(default_factory=time.perf_counter)
    full: float | None = None  # time at which all users had started
    stopped: float | None = None  # time from which no new request is sent
    users: int = 0  # largest number at one time
    sent: int = 0
    sent_by: dict[str, int] = field(default_factory=dict)  # worker process -> requests
    records: list[Record] = field(default_factory=list)
    shared: SharedPrefix | None = None  # of a workload with shared prefixes, if the target can count tokens
    cpu_began: float = field(default_factory=time.process_time)
    cpu_most: float = 0.0  # percent of a core: highest value over 5 s of any process

    def __post_init__(self) -> None:
        self.salt = self.salt or new_salt(self.settings)
        self._groups: dict[str, Iterator[list[Item]]] = {}

    def next_group(self, scenario: str) -> list[Item] | None:
        """The requests that a user sends next, in order; None when the workload is used up."""
        if scenario not in self._groups:
            self._groups[scenario] = iter(self.workloads[scenario].groups[self.index :: self.settings.generators])
        return next(self._groups[scenario], None)

    def timed(self, scenario: str) -> Timed | None:
        """This process's requests with their times in an open loop; None in a closed one."""
        workload, settings = self.workloads[scenario], self.settings
        if workload.scheduled:
            timed = [(item.at or 0.0, item) for item in workload.items]
        elif settings.rate is not None:
            times = arrivals(settings.rate, settings.seconds, shape=settings.shape, burstiness=settings.burstiness,
                             seed=settings.seed)  # fmt: skip
            timed = list(zip(times, workload.items, strict=False))
        else:
            return None
        return timed[self.index :: settings.generators]

    def merge(self, worker: str, report: Mapping[str, Any], own_clock: float) -> None:
        """Add what a worker reports: its new records, what it has sent so far, its CPU, and its `clock`."""
        records = [Record.from_wire(fields) for fields in report["records"]]
        # Another machine's times have another beginning. The time of day is what both have in common, as exact as NTP.
        ahead = report["clock"] - own_clock
        if abs(ahead) > SAME_CLOCK_SECONDS:
            for record in records:
                record.shift(ahead)
        self.records += records
        self.sent_by[worker] = report["sent"]
        self.sent = sum(self.sent_by.values())
        self.cpu_most = max(self.cpu_most, report["cpu"])

    def open_loop(self, scenario: str) -> bool:
        return self.settings.rate is not None or self.workloads[scenario].scheduled

    def used_up(self, scenario: str) -> bool:
        """Whether an open loop had more arrivals than the workload has requests, so that the rate was not kept."""
        workload, settings = self.workloads[scenario], self.settings
        if settings.rate is None or workload.scheduled:
            return False
        times = arrivals(settings.rate, settings.seconds, shape=settings.shape, burstiness=settings.burstiness,
                         seed=settings.seed)  # fmt: skip
        return len(times) > len(workload.items)

    @property
    def steady(self) -> tuple[float, float]:
        """Window from the end of the warm-up to the end of sending. Figures count requests that began in it."""
        since = (self.full or self.began) + self.settings.warmup_seconds
        until = self.stopped or time.perf_counter()
        # An open loop's arrivals end before its last answer, which is when the run is stopped.
        return since, min(until, self.began + self.settings.seconds) if self.settings.rate is not None else until

    @property
    def unfinished(self) -> int:
        """Number of requests that were cut off when the drain timeout was over."""
        return self.sent - len(self.records)


def clock() -> float:
    """The time of day at which `time.perf_counter` of this machine was 0."""
    return time.time() - time.perf_counter()


def new_salt(settings: Settings) -> str:
    """The word at the start of each text: LOAD_SALT, else a new one, so that the cache is cold for the run."""
    return settings.salt or secrets.token_hex(4)


def make_workloads(names: list[str], settings: Settings) -> dict[str, Workload]:
    """The workloads by name. Raises ValueError if a workload cannot be made from these settings."""
    return {name: WORKLOADS[name](settings.workload_shape) for name in names}
