"""Expected prompt tokens from the model's prefix cache, for prompts with a common beginning. Knows records, no HTTP."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .record import Record


@dataclass(frozen=True)
class SharedPrefix:
    """`tokens`: group -> number of tokens that all its prompts begin with. A prefix is shared in whole pages of `page`
    tokens."""

    tokens: Mapping[int, int]
    page: int

    def cached(self, group: int) -> int:
        """Number of tokens that a later request of the group takes from the cache."""
        return self.tokens.get(group, 0) // self.page * self.page


def expected_cached(
    records: Sequence[Record], shared: SharedPrefix, group_of: Callable[[Record], int]
) -> tuple[int, int]:
    """Lower and upper bound of the cached tokens, if the cache is empty before the run and evicts nothing during it.

    Each replica has its own cache. A request finds the group's prefix for certain if it started after the first token
    of another request of the same group and replica, because all pages of that prompt had been computed by then. It may
    find the prefix if another such request started before it.
    """
    least = most = 0
    computed: dict[tuple[int, str], float] = {}  # group, replica -> first token of any of their requests
    asked: dict[tuple[int, str], float] = {}  # the same -> first start
    members: dict[tuple[int, str], list[Record]] = defaultdict(list)
    for record in records:
        key = (group_of(record), record.replica)
        asked[key] = min(record.started, asked.get(key, record.started))
        if record.events:
            computed[key] = min(record.events[0], computed.get(key, record.events[0]))
        if not record.error and not record.abandoned and record.state not in {"hit", "stale", "collapsed"}:
            members[key].append(record)
    for key, group in members.items():
        tokens = shared.cached(key[0])
        least += tokens * sum(record.started > computed.get(key, record.started) for record in group)
        most += tokens * sum(record.started > asked[key] for record in group)
    return least, most
