"""What was decided about a request is true of every request of the same bytes, until the routes or the models change.

Programs send the same bytes again where they send the same request again; to parse them, to resolve the model and to
take the HMAC of a canonical form would be most of the cost of a hit. Knows requests as bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from ..cache.entry import Entry
from ..upstreams.routes import Target

LONGEST = 65_536  # bytes of a body: to parse a longer one is little beside what it asks for
LIMIT = 32 * 1024 * 1024  # bytes of all of them, with what was made of them
PARSED = 6  # how much larger a parsed body is than its bytes, about; with its canonical form

Place = tuple[str, str, bytes]  # tenant, endpoint, body
Generation = tuple[int, int]  # of the routes, of the model service's list

Header = tuple[bytes, bytes]


@dataclass(slots=True)
class PreparedHit:
    """How one entry is given out on one request's terms for as long as its age in whole seconds is the same."""

    entry: Entry
    age: int
    headers: list[Header]
    pieces: list[bytes]  # what is to be joined by `"id":…,"created":…,`


@dataclass(slots=True)
class CachedPlan:
    """What was decided. `key` is empty where no single entry can answer."""

    body: dict[str, Any]
    target: Target
    stream: bool
    include_usage: bool
    bypass: str | None
    canonical_form: bytes
    key: str
    samples: int = 1
    prepared_hit: PreparedHit | None = field(default=None, compare=False)


class PlanCache:
    """Decisions by the bytes they were made on, the ones used last."""

    def __init__(self) -> None:
        self._known: OrderedDict[Place, CachedPlan] = OrderedDict()
        self._generation: Generation = (0, 0)
        self._size = 0

    def get(self, place: Place, generation: Generation) -> CachedPlan | None:
        if generation != self._generation:
            self._known.clear()
            self._generation, self._size = generation, 0
            return None
        known = self._known.get(place)
        if known is not None:
            self._known.move_to_end(place)
        return known

    def put(self, place: Place, known: CachedPlan, generation: Generation) -> None:
        """`generation`: of before the decision. A body that is too long is not kept."""
        if len(place[2]) > LONGEST or generation != self._generation or place in self._known:
            return
        self._known[place] = known
        self._size += _weight(place)
        while self._size > LIMIT:
            self._size -= _weight(self._known.popitem(last=False)[0])


def _weight(place: Place) -> int:
    return 1000 + PARSED * len(place[2])
