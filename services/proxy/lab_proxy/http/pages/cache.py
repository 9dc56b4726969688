"""What the cache makes of a request, and its deletion: `POST /cache/explain` and `POST /cache/flush`.

Nobody is asked for an answer here, and nothing is stored. A caller learns of his own tenant's entries only: another's
key is as unknown as one that never was.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from ... import canonical
from ...cache.entry import CHAT, COMPLETIONS, EMBEDDINGS, Entry
from ...cache.store import CacheControl
from ...errors import FlushNotAllowed, InvalidRequest, UnsupportedMediaType
from ...keys.authentication import Identity
from ...requests.context import RequestContext
from ...requests.executor import Executor
from ...requests.roles import JSON, Store

if TYPE_CHECKING:
    from ..app import Page, PageRequest, Response

FLUSH = "/cache/flush"
_FIELDS = frozenset({"endpoint", "request", "against"})
_PARTS = ("version", "tenant", "upstream", "model", "revision", "endpoint")  # of a canonical form, before the body


class Shelves(Store, Protocol):
    """The cache as these pages see it."""

    async def peek(self, key: str) -> Entry | None: ...

    async def flush(self, tenant: str | None = None, model: str | None = None) -> None: ...


class Doorkeeper(Protocol):
    def is_admin(self, headers: Mapping[str, str]) -> bool: ...


class CachePages:
    """`pages` are for the application."""

    def __init__(self, exchange: Executor, cache: Shelves, keys: Doorkeeper) -> None:
        self._executor, self._cache, self._keys = exchange, cache, keys

    def pages(self) -> dict[tuple[str, str], Page]:
        return {("POST", "/cache/explain"): self._explain, ("POST", FLUSH): self._flush}

    async def _explain(self, visit: PageRequest, out: Response) -> None:
        said = await _object(visit)
        # 1. The request, and the other one or the key that it is held against.
        if "request" not in said and "messages" in said:
            said = {"request": said}
        _refuse_unknown(said, _FIELDS)
        endpoint, request, against = said.get("endpoint", CHAT), said.get("request"), said.get("against")
        if endpoint not in (CHAT, COMPLETIONS, EMBEDDINGS):  # no set: it may be a list, which has no hash
            raise InvalidRequest(f"`endpoint` is one of {CHAT}, {COMPLETIONS}, {EMBEDDINGS}.", param="endpoint")
        if not isinstance(request, dict):
            raise InvalidRequest("`request` must be the body of a request to that endpoint.", param="request")
        if against is not None and not isinstance(against, (dict, str)):
            raise InvalidRequest("`against` must be another request's body, or a key.", param="against")
        # 2. What the cache has of it.
        weighed = await self._executor.planner.preview(_call(visit.identity, endpoint, request))
        answer: dict[str, Any] = {
            "endpoint": endpoint,
            "canonical": weighed.canonical_form.decode(),
            "key": weighed.keys[0] if len(weighed.keys) == 1 else weighed.keys,
            "cacheable": weighed.bypass is None,
            "why": weighed.bypass,
        }
        found = await self._cache.read(weighed.keys, stamp=weighed.epoch) if weighed.bypass is None else []
        now = time.time()
        hit = bool(found) and all(each is not None and each.age(now) < each.ttl for each in found or ())
        answer["state"] = "unknown" if found is None else "hit" if hit else "miss"
        # 3. In what they differ.
        if isinstance(against, dict):
            other = (await self._executor.planner.preview(_call(visit.identity, endpoint, against))).canonical_form
            answer["differs"] = _differs(weighed.canonical_form, other)
        elif against is not None:
            answer["differs"] = _differs(weighed.canonical_form, await self._form(visit.identity, against))
        await out.send(orjson.dumps(answer), {"cache-control": "no-store"})

    async def _form(self, identity: Identity, key: str) -> bytes:
        """The canonical form under this key. Raises InvalidRequest where this tenant has no such entry."""
        entry = await self._cache.peek(key) if len(key) <= 80 and key.isascii() else None  # with a sample's number
        if entry is not None and entry.canonical_form:
            _, tenant, _, model, *_ = orjson.loads(entry.canonical_form)
            if tenant == identity.tenant and entry.epoch == self._cache.epoch(tenant, model):
                return entry.canonical_form
        raise InvalidRequest(
            "Nothing is stored under this key: the key of a hit is in its `cache-status`.",
            param="against",
            code="cache_key_not_found",
            status=404,
        )

    async def _flush(self, visit: PageRequest, out: Response) -> None:
        said = await _object(visit)
        _refuse_unknown(said, frozenset({"tenant", "model", "all"}))
        tenant, model, everything = said.get("tenant"), said.get("model"), said.get("all", False)
        for name, value in (("tenant", tenant), ("model", model)):
            if value is not None and (not isinstance(value, str) or not 0 < len(value) <= 500):
                raise InvalidRequest(f"`{name}` must be a name.", param=name)
        if not isinstance(everything, bool) or (everything and (tenant or model)):
            raise InvalidRequest("`all` is true or false, and goes with nothing else.", param="all")
        model = self._executor.planner.resolve_alias(model) if model else None
        if not self._keys.is_admin(visit.headers):
            own = visit.identity.tenant
            if everything or visit.identity.shared or (tenant is not None and tenant != own):
                raise FlushNotAllowed(
                    "With this key only its own tenant's answers can be flushed; the admin key flushes any."
                )
            tenant = own
        elif not everything and tenant is None and model is None:
            raise InvalidRequest('Say what to flush: {"tenant": …}, {"model": …}, both, or {"all": true}.')
        await self._cache.flush(tenant, model)
        await out.send(orjson.dumps({"flushed": {"tenant": tenant, "model": model}}), {})


async def _object(visit: PageRequest) -> dict[str, Any]:
    if visit.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
        raise UnsupportedMediaType("The body must be application/json, and the header `content-type` must say so.")
    return canonical.parse(await visit.read())


def _refuse_unknown(said: Mapping[str, Any], known: frozenset[str]) -> None:
    for name in said:
        if name not in known:
            raise InvalidRequest(f"Unknown field: there is {', '.join(sorted(known))}.", param=name[:200])


def _call(identity: Identity, endpoint: str, body: dict[str, Any]) -> RequestContext:
    return RequestContext(
        identity, endpoint, b"", body, "", CacheControl(), store_sampled=False, started=time.perf_counter()
    )


def _differs(one: bytes, two: bytes) -> list[str]:
    """The paths in which two canonical forms differ: `messages[0].content` of the body, or what stands before it."""
    mine, other = canonical.parse(b'{"form":%s}' % one)["form"], canonical.parse(b'{"form":%s}' % two)["form"]
    named = [name for name, a, b in zip(_PARTS, mine, other, strict=False) if a != b]
    bodies = [{"body": form[len(_PARTS)], "input": form[len(_PARTS) + 1 :]} for form in (mine, other)]
    body = [path for path in _paths(bodies[0]["body"], bodies[1]["body"], "") if path != "model"]
    return named + body + ([] if bodies[0]["input"] == bodies[1]["input"] else ["input"])


def _paths(one: Any, two: Any, at: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(two, dict):
        for name in sorted(one.keys() | two.keys()):
            path = f"{at}.{name}" if at else name
            if (name in one) != (name in two):
                yield path
            else:
                yield from _paths(one[name], two[name], path)
    elif isinstance(one, list) and isinstance(two, list):
        for place in range(max(len(one), len(two))):
            if place >= min(len(one), len(two)):
                yield f"{at}[{place}]"
            else:
                yield from _paths(one[place], two[place], f"{at}[{place}]")
    elif type(one) is not type(two) or one != two:
        yield at
