"""Plan of a request: model, upstream, cache key, whether it may be cached, and which requests may share its answer.

Knows routes, defaults and earlier plans. Makes no calls, except to refresh the model list for an unknown name.
"""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .. import canonical
from ..cache import entry
from ..cache.key import canonical_form, comparable, input_keys, key_of, with_input
from ..cache.policy import bypass_reason
from ..cache.store import Cache
from ..endpoints import EMBEDDINGS, ENDPOINTS, Endpoint
from ..errors import InvalidRequest, ModelNotAllowed, ModelNotFound
from ..long_bodies import LONG_BODY, off_loop
from ..lru import LRU
from ..upstreams.model_list import ModelList
from ..upstreams.routes import Routes, Target, usable
from .context import Plan, RequestContext
from .openai_tokens import VOCABULARIES, decode_inputs

MAX_BODY_BYTES = 65_536  # of a request whose plan is kept: parsing a longer body costs little compared with its answer
MAX_NAME = 256  # characters of a model's name: names are kept with plans, epochs and the ledger
PLAN_BYTES = 32 * 1024 * 1024  # of all kept plans, with the requests, their parsed bodies and canonical forms
PARSED_FACTOR = 6  # size of a parsed body and its canonical form, in sizes of its bytes


@dataclass(frozen=True, slots=True)
class Preview:
    canonical_form: bytes
    keys: list[str]
    epoch: str
    bypass: str | None


def check_permission(request: RequestContext, target: Target) -> None:
    """Raises ModelNotAllowed."""
    if not request.identity.allows(target.model, *([target.alias] if target.alias else [])):
        raise ModelNotAllowed(f"This key may not use the model `{target.alias or target.model}`.", param="model")


class Planner:
    """Makes the plan of each request.

    Keeps plans by the bytes of their requests: programs repeat requests byte by byte, and parsing the body, resolving
    the model and computing the HMAC of the canonical form would be most of the cost of a hit. A change of the routes or
    of the model list drops all of them.
    """

    def __init__(self, cache: Cache, routes: Routes, models: ModelList) -> None:
        self._cache, self._routes, self._models = cache, routes, models
        self._plans: LRU[Plan] = LRU(PLAN_BYTES)  # by tenant, endpoint and body
        self._plans_of = (0, 0)  # generation of the routes and the model list

    @property
    def _generation(self) -> tuple[int, int]:
        return self._routes.generation, self._models.generation

    def cached_plan(self, tenant: str, endpoint: str, raw: bytes) -> Plan | None:
        """The plan of an earlier request with the same bytes, as it was made, without the state of that request."""
        if self._plans_of != self._generation:
            self._plans.clear()
            self._plans_of = self._generation
        return self._plans.get((tenant, endpoint, raw))

    def _keep(self, plan: Plan, generation: tuple[int, int]) -> None:
        """`generation`: from before the plan was made."""
        request = plan.request
        if request.plan_cacheable and len(request.raw) <= MAX_BODY_BYTES and generation == self._plans_of:
            bare = RequestContext(request.identity, request.endpoint, b"", request.body, "")
            weight = 1500 + PARSED_FACTOR * len(request.raw)
            self._plans.put((request.tenant, request.endpoint, request.raw), plan.for_request(bare), weight)

    def resolve_alias(self, name: str) -> str:
        """The model behind a name."""
        return self._routes.aliases(self._models.entries).get(name, name)

    async def plan(self, request: RequestContext) -> Plan:
        """The plan of a request. Raises InvalidRequest, ModelNotFound or UpstreamDown."""
        if request.cached_plan is not None:
            epoch = self._cache.epoch(request.tenant, request.cached_plan.target.model)
            _record_target(request, request.cached_plan.target)
            return request.cached_plan.for_request(request, epoch)
        try:
            generation, plan = self._generation, await self._make(request)
        except ModelNotFound as unknown:
            # The model was loaded since the last poll, or is still loading: ask the model service.
            await self._models.refresh(unknown.model)
            generation, plan = self._generation, await self._make(request)
        target = plan.target
        if target.versioned and not target.revision and not usable(self._models.entries.get(target.model, {})):
            await self._models.refresh(target.model)  # it never was in memory, so there are no cached answers either
            generation, plan = self._generation, await self._make(request)
        if plan.bypass is None and not ENDPOINTS[request.endpoint].per_input:
            size = len(request.raw) or LONG_BODY + 1  # a preview has no raw body; treat it as long
            plan.canonical_form = await off_loop(size, self.canonical_form, plan, target.revision)
            plan.key = key_of(self._cache.secret, plan.canonical_form)
        self._keep(plan, generation)
        return plan

    async def preview(self, request: RequestContext) -> Preview:
        """What the cache would do with `request`. Calls no upstream. Raises like `plan`, and ModelNotAllowed."""
        plan = await self.plan(request)
        check_permission(request, plan.target)
        return await asyncio.to_thread(self._preview, request, plan)

    def _preview(self, request: RequestContext, plan: Plan) -> Preview:
        endpoint, revision = ENDPOINTS[request.endpoint], plan.target.revision
        units = entry.inputs(request.body.get(endpoint.input_field)) if endpoint.per_input else None
        if units is None:
            form = self.canonical_form(plan, revision)
            keys = plan.keys if plan.key else [key_of(self._cache.secret, form)]
            return Preview(form, keys, plan.epoch, plan.bypass)
        texts = list(dict.fromkeys(canonical.encode(unit) for unit in units[: endpoint.max_inputs]))
        form = with_input(self.canonical_form(plan, revision, without=endpoint.input_field), b",".join(texts))
        return Preview(form, self.input_keys(plan, revision, texts), plan.epoch, plan.bypass)

    async def _make(self, request: RequestContext) -> Plan:
        body, endpoint = request.body, ENDPOINTS[request.endpoint]
        # 1. The fields that the proxy itself reads.
        if endpoint.default_kinds and body.get("model") is None and (name := self._default_model(endpoint)):
            body = request.body = body | {"model": name}
            request.raw = canonical.dump(body)
        model, stream, options = body.get("model"), body.get("stream"), body.get("stream_options")
        if not isinstance(model, str) or not 0 < len(model) <= MAX_NAME:
            why = f"`model` must be the name of a model, of at most {MAX_NAME} characters: see /v1/models."
            raise InvalidRequest(why, param="model")
        if stream is not None and not isinstance(stream, bool):
            raise InvalidRequest("`stream` must be true or false.", param="stream")
        if options is not None and (not isinstance(options, dict) or not stream):
            raise InvalidRequest("`stream_options` must be an object, with `stream: true`.", param="stream_options")
        n = body.get("n")
        if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
            raise InvalidRequest("`n` must be a whole number, at least 1.", param="n")
        if not isinstance(body.get("store"), bool | None):
            raise InvalidRequest("`store` must be true or false.", param="store")
        # 2. The target.
        target = self._routes.resolve(model, self._models.entries, body)
        _record_target(request, target)
        if target.versioned and endpoint.path == EMBEDDINGS and (name := VOCABULARIES.get(target.alias or "")):
            # Clients send ids of the vocabulary of the model that they name: a local model gets their text.
            units = body.get(endpoint.input_field)
            if isinstance(units, list) and units and not isinstance(units[0], str):
                texts = await off_loop(len(request.raw), decode_inputs, units, name)
                body = request.body = body | {endpoint.input_field: texts}
                request.raw = canonical.dump(body)
        kind = self._models.entries.get(target.model, {}).get("kind") if target.versioned else None
        if kind and kind not in endpoint.kinds:
            raise InvalidRequest(f"`{model}` is of kind {kind}, which {endpoint.path} does not accept.", param="model")
        # 3. The cache.
        if endpoint.handler == "responses":
            _check_responses(body, target)
        bypass = None if self._cache.enabled else "disabled"
        bypass = "no-store" if request.cache_control.no_store else bypass
        bypass = bypass or (None if endpoint.cacheable else "endpoint")
        temperature = target.default_temperature.get(endpoint.path)
        sampled = target.store_sampled or request.store_sampled
        bypass = bypass or bypass_reason(endpoint.path, body, temperature, sampled)
        forward = "request" if request.cache_control.no_cache else "miss"
        epoch = self._cache.epoch(request.tenant, target.model)
        include_usage = bool((options or {}).get("include_usage"))
        plan = Plan(request, target, bool(stream), include_usage, bypass, epoch=epoch, forward=forward)
        if target.samples > 1 and bypass is None:
            deterministic = bypass_reason(endpoint.path, body, temperature, store_sampled=False) is None
            plan.samples = 1 if deterministic else target.samples
        return plan

    def _default_model(self, endpoint: Endpoint) -> str | None:
        """The first listed model of the first kind that has one; None if there is none."""
        listed = self._models.entries
        of_kind = (name for kind in endpoint.default_kinds for name in listed if listed[name].get("kind") == kind)
        return next(of_kind, None)

    def canonical_form(self, plan: Plan, revision: str | None, *, without: str = "") -> bytes:
        """The canonical form of the request, or of the request `without` one field."""
        request, target = plan.request, plan.target
        if plan.canonical_form and not without and revision == target.revision:
            return plan.canonical_form
        body = {name: value for name, value in request.body.items() if name != without} if without else request.body
        return canonical_form(
            tenant=request.tenant,
            upstream=target.upstream,
            model=target.model,
            revision=revision,
            endpoint=request.endpoint,
            body=comparable(
                body, target.model, target.defaults.get(request.endpoint, {}), local=target.config.kind == "model"
            ),
        )

    def input_keys(self, plan: Plan, revision: str | None, inputs: Iterable[bytes]) -> list[str]:
        """One key for each canonical input."""
        field = ENDPOINTS[plan.request.endpoint].input_field
        rest = key_of(self._cache.secret, self.canonical_form(plan, revision, without=field))
        return input_keys(self._cache.secret, rest, inputs)

    def flight_name(self, plan: Plan, key: str) -> str:
        """The name of the flight that this request may share; empty: none. Requests with the same name need the same
        upstream call, and accept the same entry of the cache."""
        directives = plan.request.cache_control
        if plan.bypass or not key or directives.no_cache or directives.only_if_cached:
            return ""
        mode = "stream" if plan.stream else "json"
        if plan.include_usage and not plan.target.config.stream_usage:
            mode += ":usage"
        if directives.max_age is not None:
            mode += f":{directives.max_age}"
        fallbacks = [f":{each.upstream}/{each.model}" for each in plan.targets[1:]]
        return ":".join((key, plan.epoch, mode)) + "".join(fallbacks)


def _record_target(request: RequestContext, target: Target) -> None:
    record = request.record
    record.model, record.upstream, record.model_known = target.model, target.upstream, target.versioned


def _check_responses(body: Mapping[str, Any], target: Target) -> None:
    """Raises InvalidRequest for a Response that the proxy cannot pass through."""
    if not target.config.responses:
        why = "which has no Responses API: use /v1/chat/completions, or another model."
        raise InvalidRequest(f"`{target.model}` is served by `{target.upstream}`, {why}", param="model")
    if body.get("background"):
        why = "its answer would be fetched later, but the proxy does not store Responses."
        raise InvalidRequest(f"`background` is not supported: {why}", param="background")
