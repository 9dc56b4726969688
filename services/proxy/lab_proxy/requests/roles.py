"""What the exchange is handed and what it answers on, as it sees them: a cache, limits, a ledger, a way out.

Says what is expected of each; the modules that do it know nothing of this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..cache.entry import Entry
from ..cache.store import PipelinedCommand
from ..keys.authentication import Identity
from ..ledger.ledger import Charge

JSON = "application/json"
SSE = "text/event-stream; charset=utf-8"


class Store(Protocol):
    """The cache as the exchange sees it; cache.Cache is one."""

    enabled: bool
    secret: bytes

    def epoch(self, tenant: str, model: str) -> str: ...

    def resize(self, key: str, entry: Entry, size: int) -> None: ...

    def get_local(self, key: str, stamp: str, now: float) -> Entry | None: ...

    async def read(
        self, keys: Sequence[str], *asks: PipelinedCommand, stamp: str = ""
    ) -> list[Entry | None] | None: ...

    async def write(self, entries: Mapping[str, Entry]) -> str | None: ...


class Admission(PipelinedCommand, Protocol):
    """One request's claim on its key's limits (limits.Admission). It rides along with the cache's read."""

    headers: dict[str, str]

    def settle(self, tokens: int) -> None:
        """The request is over and used so many tokens of an upstream. Called once or more often, always."""

    def correct(self, tokens: int) -> None:
        """It really used so many, if it is over."""


class Limiter(Protocol):
    """limits.Limits as the exchange sees it."""

    def admission(  # noqa: PLR0917 all that a limit can be about
        self,
        identity: Identity,
        endpoint: str,
        model: str,
        body: Mapping[str, Any],
        size_bytes: int,
        upstream: str,
        *,
        at_once: bool = False,
    ) -> Admission | None: ...

    async def ask(self, admission: Admission) -> None:
        """The same question where the cache cannot carry it."""


class Recorder(Protocol):
    """ledger.Ledger as the exchange sees it: never waits, never fails."""

    def record(self, charge: Charge) -> None: ...

    def correct(self, charge: Charge, prompt: int, completion: int, cached: int) -> None: ...


class NoLimits:
    """What stands in for limits where there are none."""

    def admission(self, *_: Any, **__: Any) -> None:
        return None

    async def ask(self, admission: Admission) -> None: ...


class ResponseWriter(Protocol):
    """Where the answer goes."""

    headers: dict[str, str]  # of every answer to this request
    started: bool
    ended: bool

    async def send(self, body: bytes, headers: Mapping[str, str], content_type: str = JSON) -> None: ...

    async def start_stream(self, headers: Mapping[str, str]) -> None: ...

    async def write(self, data: bytes) -> None: ...

    async def end(self) -> None: ...


class Quick(ResponseWriter, Protocol):
    """An Out that takes what is ready to go."""

    async def send_prepared(self, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """A whole answer whose own headers are made."""
