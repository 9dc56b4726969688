"""Cache entries: the stored form of an answer, and single vectors of embeddings answers.

Works on parsed answers and bytes. Knows nothing of redis, HTTP or callers.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import getrandbits  # an id is no secret
from typing import Any

import orjson

from ..endpoints import COMPLETIONS
from ..telemetry.record import MAX_TOKENS, token_count
from .key import CONTRACT

MAX_UNITS = 300_000  # inputs, or token ids of one input: OpenAI's limit of all ids. 8 MB may hold 4 million
OBJECT_BYTES = 1500  # of an entry and its place in a dict, besides its body; measured
PREPARED_BYTES = 1500  # of a prepared hit and its place in a dict, besides its pieces


@dataclass(slots=True)
class PreparedHit:
    """A hit ready to be sent, valid while the entry's age in whole seconds stays the same."""

    age: int
    headers: dict[str, str]
    head: bytes  # the headers as lines of HTTP
    pieces: list[bytes]  # to be joined by `"id":…,"created":…,`


@dataclass(slots=True)
class Entry:
    """A stored answer. `body`: JSON, either a chat or text answer without `id` and `created`, which are spliced in, or
    one vector. `metadata`: `usage`, and for embeddings the answer without its vectors."""

    body: bytes
    ttl: int
    stored_at: float
    metadata: dict[str, Any] = field(default_factory=dict)
    epoch: str = ""  # the epoch it belongs to: a flush begins a new one
    grace: int = 0  # seconds after the TTL in which the stale entry may be served
    canonical_form: bytes = b""  # of the request; canonical JSON has no line break
    weight: int = field(init=False)  # approximate bytes in this process
    prepared: dict[Any, PreparedHit] = field(init=False, default_factory=dict)  # by form of the answer, and alias

    def __post_init__(self) -> None:
        self.weight = len(self.body) + len(self.canonical_form) + OBJECT_BYTES

    def attach_request(self, form: bytes, grace: int) -> None:
        """Store the request's canonical form with the entry, and keep it for `grace` seconds after the TTL."""
        self.canonical_form, self.grace = form, grace
        self.weight += len(form)

    def pack(self) -> bytes:
        head = {"v": CONTRACT, "at": self.stored_at, "ttl": self.ttl, "grace": self.grace, "stamp": self.epoch}
        rest = self.canonical_form + b"\n" + self.body
        return orjson.dumps(head | {"crc": zlib.crc32(rest), "about": self.metadata}) + b"\n" + rest

    @classmethod
    def unpack(cls, raw: Any) -> Entry | None:
        """The entry in `raw`; None for garbage, a truncated entry or one of another version."""
        if not isinstance(raw, bytes):
            return None
        first, found, rest = raw.partition(b"\n")
        try:
            head = orjson.loads(first)
            if not found or head["v"] != CONTRACT or head["crc"] != zlib.crc32(rest):
                return None
            form, _, body = rest.partition(b"\n")
            about, stamp, grace = dict(head["about"]), str(head["stamp"]), int(head["grace"])
            return cls(body, int(head["ttl"]), float(head["at"]), about, stamp, grace, form)
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            return None

    def age(self, now: float) -> int:
        return max(0, int(now - self.stored_at))


def of_answer(answer: Mapping[str, Any], ttl: int, now: float, stamp: str) -> Entry:
    """A chat or text answer as an entry, without its `id` and `created`."""
    kept = {name: value for name, value in answer.items() if name not in {"id", "created"}}
    return Entry(orjson.dumps(kept), ttl, now, {"usage": answer.get("usage")}, stamp)


def new_id(endpoint: str) -> str:
    """A new `id` for an answer, with OpenAI's prefix for this endpoint."""
    return f"{'cmpl' if endpoint == COMPLETIONS else 'chatcmpl'}-{getrandbits(112):028x}"


def with_identity(body: bytes, identity: str, created: int) -> bytes:
    """A stored body with a new `id` and `created`, spliced in without parsing."""
    return b'{"id":"%s","created":%d,' % (identity.encode(), created) + body[1:]


def inputs(value: Any) -> list[Any] | None:
    """The inputs of an embeddings or a task request, each a text, a list of token ids or an object; None for an unknown
    shape."""
    if isinstance(value, (str, dict)):
        return [value]
    if not isinstance(value, list) or not 0 < len(value) <= MAX_UNITS:
        return None
    if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return [value]
    for kind in (str, list, dict):
        if all(isinstance(item, kind) and (item or kind is str) for item in value):
            return value
    return None


def shares(total: int, weights: list[int]) -> list[int]:
    """`total` split in proportion to `weights` by the largest remainder: integers with exactly this sum."""
    whole = sum(weights)
    if not whole:
        weights, whole = [1] * len(weights), len(weights)
    split = [total * weight // whole for weight in weights]
    order = sorted(range(len(weights)), key=lambda i: -(total * weights[i] % whole))
    for i in order[: total - sum(split)]:
        split[i] += 1
    return split


def of_vectors(answer: Any, units: list[Any], ttl: int, now: float, stamp: str) -> list[Entry]:
    """One entry for each of `units`. Raises ValueError if the answer does not hold one vector for each. An input's
    tokens are its `usage.per_input_tokens`, or else its share of the total by length."""
    try:
        rows = sorted(answer["data"], key=lambda row: row["index"])
        vectors = [row["embedding"] for row in rows]
        if [row["index"] for row in rows] != list(range(len(units))) or not all(map(_is_vector, vectors)):
            raise ValueError("not one vector for each input")
        usage = answer.get("usage") if isinstance(answer.get("usage"), dict) else {}
        reported: Any = usage.get("per_input_tokens")
        exact = isinstance(reported, list) and len(reported) == len(units) and are_counts(reported)
        lengths = [len(unit) for unit in units]
        tokens: list[int] = list(reported) if exact else shares(token_count(usage, "prompt_tokens"), lengths)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("not an answer with vectors") from error
    frame = {name: value for name, value in answer.items() if name not in {"data", "usage", "id", "created"}}
    orjson.dumps(frame)  # raises a TypeError here rather than when it is stored
    return [
        Entry(orjson.dumps(vector), ttl, now, {"tokens": count, "exact": exact, "frame": frame}, stamp)
        for vector, count in zip(vectors, tokens, strict=True)
    ]


def _is_vector(value: Any) -> bool:
    """Numbers, or their bytes in base64."""
    return bool(value) and (isinstance(value, str) or (isinstance(value, list) and {*map(type, value)} <= {int, float}))


def are_counts(values: list[Any]) -> bool:
    """Each is a number of tokens."""
    return all(type(value) is int and 0 <= value <= MAX_TOKENS for value in values)


def to_vectors(kept: list[Entry], order: list[int]) -> tuple[bytes, dict[str, Any]]:
    """One answer from single vectors, and its usage. `order`: index of the vector of each input, with duplicates."""
    counts = [kept[place].metadata["tokens"] for place in order]
    usage: dict[str, Any] = {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}
    if all(entry.metadata["exact"] for entry in kept):
        usage["per_input_tokens"] = counts
    rows = b",".join(
        b'{"object":"embedding","index":%d,"embedding":%s}' % (index, kept[place].body)
        for index, place in enumerate(order)
    )
    return b'{"data":[' + rows + b"]," + orjson.dumps(kept[0].metadata["frame"] | {"usage": usage})[1:], usage
