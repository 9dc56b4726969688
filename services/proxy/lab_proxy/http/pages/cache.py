"""Pages about the cache: what it would do with a request (POST /cache/explain), and deletion (POST /cache/flush).

They call no upstream and store nothing. A caller sees only entries of its own tenant; another tenant's key looks like
an unknown one.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import orjson

from ...cache.key import differences
from ...cache.store import Cache
from ...endpoints import CACHEABLE, CHAT, FLUSH
from ...errors import FlushNotAllowed, InvalidRequest
from ...keys.authentication import Authenticator
from ...keys.identity import Identity
from ...keys.limits import Limits
from ...requests.context import RequestContext
from ...requests.planner import Planner
from ..guards import read_json
from ..response import PRIVATE, PageRequest, Pages, Response


class CachePages:
    def __init__(self, planner: Planner, cache: Cache, keys: Authenticator, limits: Limits) -> None:
        self._planner, self._cache, self._keys, self._limits = planner, cache, keys, limits

    def pages(self) -> Pages:
        return {("POST", "/cache/explain"): self._explain, ("POST", FLUSH): self._flush}

    async def _explain(self, page: PageRequest, response: Response) -> None:
        fields = await read_json(page)
        await self._limits.count(page.identity)
        # 1. The request, and what it is compared with: another request, or a key.
        if "request" not in fields and "messages" in fields:
            fields = {"request": fields}
        _refuse_unknown(fields, frozenset({"endpoint", "request", "against"}))
        endpoint, request, against = fields.get("endpoint", CHAT), fields.get("request"), fields.get("against")
        if endpoint not in CACHEABLE:
            raise InvalidRequest(f"`endpoint` must be one of {', '.join(CACHEABLE)}.", param="endpoint")
        if not isinstance(request, dict):
            raise InvalidRequest("`request` must be the body of a request to that endpoint.", param="request")
        if against is not None and not isinstance(against, (dict, str)):
            raise InvalidRequest("`against` must be another request's body, or a key.", param="against")
        # 2. What the cache would do.
        preview = await self._planner.preview(_context(page.identity, endpoint, request))
        answer: dict[str, Any] = {
            "endpoint": endpoint,
            "canonical": preview.canonical_form.decode(),
            "key": preview.keys[0] if len(preview.keys) == 1 else preview.keys,
            "cacheable": preview.bypass is None,
            "why": preview.bypass,
        }
        found = await self._cache.read(preview.keys, epoch=preview.epoch) if preview.bypass is None else []
        now = time.time()
        hit = bool(found) and all(each is not None and each.age(now) < each.ttl for each in found or ())
        answer["state"] = "unknown" if found is None else "hit" if hit else "miss"
        # 3. The differences.
        if isinstance(against, dict):
            other = await self._planner.preview(_context(page.identity, endpoint, against))
            answer["differs"] = await asyncio.to_thread(differences, preview.canonical_form, other.canonical_form)
        elif against is not None:
            stored = await self._stored_form(page.identity, against)
            answer["differs"] = await asyncio.to_thread(differences, preview.canonical_form, stored)
        await response.send(orjson.dumps(answer), PRIVATE)

    async def _stored_form(self, identity: Identity, key: str) -> bytes:
        """The canonical form stored under this key. Raises InvalidRequest if this tenant has no such entry."""
        entry = await self._cache.peek(key) if len(key) <= 80 and key.isascii() else None  # with a sample's number
        if entry is not None and entry.canonical_form:
            _, tenant, _, model, *_ = orjson.loads(entry.canonical_form)
            if tenant == identity.tenant and entry.epoch == self._cache.epoch(tenant, model):
                return entry.canonical_form
        why = "No entry has this key. The header `cache-status` of a hit has its key."
        raise InvalidRequest(why, param="against", code="cache_key_not_found", status=404)

    async def _flush(self, page: PageRequest, response: Response) -> None:
        fields = await read_json(page)
        _refuse_unknown(fields, frozenset({"tenant", "model", "all"}))
        tenant, model, everything = fields.get("tenant"), fields.get("model"), fields.get("all", False)
        for name, value in (("tenant", tenant), ("model", model)):
            if value is not None and (not isinstance(value, str) or not 0 < len(value) <= 500):
                raise InvalidRequest(f"`{name}` must be a name.", param=name)
        if not isinstance(everything, bool) or (everything and (tenant or model)):
            raise InvalidRequest("`all` must be true or false, and no other field may be given with it.", param="all")
        model = self._planner.resolve_alias(model) if model else None
        if not self._keys.is_admin(page.headers):
            own = page.identity.tenant
            if everything or page.identity.shared or (tenant is not None and tenant != own):
                why = "This key may flush only its own tenant's answers; the admin key may flush any."
                raise FlushNotAllowed(why)
            tenant = own
        elif not everything and tenant is None and model is None:
            raise InvalidRequest('Give the answers to flush: {"tenant": …}, {"model": …}, both, or {"all": true}.')
        await self._cache.flush(tenant, model)
        await response.send(orjson.dumps({"flushed": {"tenant": tenant, "model": model}}), {})


def _refuse_unknown(fields: Mapping[str, Any], known: frozenset[str]) -> None:
    for name in fields:
        if name not in known:
            raise InvalidRequest(f"Unknown field. Fields: {', '.join(sorted(known))}.", param=name[:200])


def _context(identity: Identity, endpoint: str, body: dict[str, Any]) -> RequestContext:
    return RequestContext(identity, endpoint, b"", body, "", started=time.perf_counter())
