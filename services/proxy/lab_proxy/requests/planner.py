"""What is decided about a request before anybody is asked: its model and target, its canonical form, key and flight.

Knows routes, defaults and what was decided about the same bytes before. Speaks to nobody but for the list of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .. import canonical
from ..cache import entry
from ..cache.entry import EMBEDDINGS
from ..cache.store import sample_key
from ..errors import InvalidRequest, ModelNotAllowed, ModelNotFound
from ..upstreams.model_list import ModelList
from ..upstreams.routes import Routes, Target
from . import responses
from .context import RequestContext
from .plan_cache import CachedPlan, PlanCache
from .responses import RESPONSES
from .roles import Store

MOST_INPUTS = 2048  # OpenAI's limit of embedding inputs


@dataclass(slots=True)
class Plan:
    """What was decided about one call before anybody was asked."""

    request: RequestContext
    target: Target
    stream: bool
    include_usage: bool
    bypass: str | None
    forward: str = "miss"
    epoch: str = ""  # the epoch in which this request began: what it stores is of then
    canonical_form: bytes = b""  # canonical, under the target's revision
    limits_checked: bool = False  # the limits were asked
    retried_at: float = 0.0  # time.perf_counter() when the upstream was asked once more, on behalf of others
    key: str = ""  # of `form`; empty for embeddings, which have one for each input, and where there is a bypass
    samples: int = 1  # answers that are kept side by side
    slot: int = 0  # which of them this request's answer becomes
    shareable: bool = False  # others may board the flight that asks for it

    @property
    def keys(self) -> list[str]:
        """The key of each sample: the first has the request's own."""
        return [sample_key(self.key, slot) for slot in range(self.samples)]

    @property
    def _alias(self) -> dict[str, str]:
        said = {"x-model-alias": self.target.alias} if self.target.alias else {}
        return said | {"x-model-auto": self.target.auto} if self.target.auto else said

    def miss_headers(self, outcome: str | None = None) -> dict[str, str]:
        """Headers of an answer that came from an upstream. `outcome`: `stored`, or why not."""
        if self.bypass:
            status = f"llm-lab; fwd=bypass; detail={self.bypass}"
        else:
            end = {None: "", "stored": "; stored"}.get(outcome, f"; detail={outcome}")
            status = f"llm-lab; fwd={self.forward}{end}"
        return {"cache-status": status, **self._alias}

    def collapsed_headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Headers of an answer that another request's upstream call gives; `headers`: those of that call."""
        kept = {name: headers[name] for name in ("x-model-revision", "x-model-fallback") if name in headers}
        return {"cache-status": f"llm-lab; fwd={self.forward}; collapsed", **kept, **self._alias}

    def hit_headers(self, ttl: int, age: int, key: str | None, failed: int | None = None) -> dict[str, str]:
        """Headers of an answer from the cache. `failed`: it stands in for this status of the upstream's."""
        status = f"llm-lab; hit; ttl={ttl - age}" + (f'; key="{key}"' if key else "")
        if failed is not None:
            status = f"llm-lab; fwd=stale; fwd-status={failed}"
        revision = {"x-model-revision": self.target.revision} if self.target.revision else {}
        return {"cache-status": status, "age": str(age), **revision, **self._alias}

    @property
    def targets(self) -> list[Target]:
        """Who may be asked, in this order."""
        allows = self.request.identity.allows
        return [self.target, *(each for each in self.target.fallbacks if allows(each.model))]


@dataclass(frozen=True, slots=True)
class Preview:
    """What the cache makes of a request: its canonical form, where its answer would lie, and why not."""

    canonical_form: bytes
    keys: list[str]
    epoch: str
    bypass: str | None


def permit(call: RequestContext, target: Target) -> None:
    """Raises ModelNotAllowed."""
    if not call.identity.allows(target.model, *([target.alias] if target.alias else [])):
        raise ModelNotAllowed(f"This key is not for the model `{target.alias or target.model}`.", param="model")


class Planner:
    """Finds the way of each call."""

    def __init__(self, cache: Store, routes: Routes, local: ModelList) -> None:
        self._cache = cache
        self._routes = routes
        self._local = local
        self._plan_cache = PlanCache()

    def cached_plan(self, tenant: str, endpoint: str, raw: bytes) -> CachedPlan | None:
        """What was decided about the same bytes, if it still holds."""
        return self._plan_cache.get((tenant, endpoint, raw), self._generation)

    @property
    def _generation(self) -> tuple[int, int]:
        return self._routes.generation, self._local.generation

    async def preview(self, call: RequestContext) -> Preview:
        """What the cache would make of `call`, without asking anybody. Raises what `answer` raises before it asks."""
        way = await self.plan(call)
        permit(call, way.target)
        revision = way.target.revision
        units = entry.inputs(call.body.get("input")) if call.endpoint == EMBEDDINGS else None
        if units is None:
            form = self.canonical_form(way, revision)
            keys = way.keys if way.key else [canonical.key_of(self._cache.secret, form)]
            return Preview(form, keys, way.epoch, way.bypass)
        given = list(dict.fromkeys(canonical.encode(unit) for unit in units[:MOST_INPUTS]))
        form = canonical.with_input(self.canonical_form(way, revision, without="input"), b",".join(given))
        return Preview(form, self.input_keys(way, revision, given), way.epoch, way.bypass)

    def resolve_alias(self, name: str) -> str:
        """The model that a name stands for."""
        return self._routes.aliases(self._local.entries).get(name, name)

    async def plan(self, call: RequestContext) -> Plan:
        """What is decided about `call`. Raises InvalidRequest, NoSuchModel or UpstreamDown."""
        if call.cached_plan is not None:
            return self._replan(call, call.cached_plan)
        try:
            generation, way = self._generation, self._decide(call)
        except ModelNotFound as unknown:
            # Loaded since the last look, or still loading: only the service itself can tell.
            await self._local.refresh(unknown.model)
            generation, way = self._generation, self._decide(call)
        if way.bypass is None and call.endpoint != EMBEDDINGS:
            way.canonical_form = self.canonical_form(way, way.target.revision)
            way.key = canonical.key_of(self._cache.secret, way.canonical_form)
        if call.plan_cacheable:
            known = CachedPlan(
                call.body,
                way.target,
                way.stream,
                way.include_usage,
                way.bypass,
                way.canonical_form,
                way.key,
                way.samples,
            )
            self._plan_cache.put((call.tenant, call.endpoint, call.raw), known, generation)
        return way

    def _replan(self, call: RequestContext, known: CachedPlan) -> Plan:
        target = known.target
        call.record.model, call.record.upstream, call.record.model_known = (
            target.model,
            target.upstream,
            target.versioned,
        )
        stamp = self._cache.epoch(call.tenant, target.model)
        return Plan(
            call,
            target,
            known.stream,
            known.include_usage,
            known.bypass,
            epoch=stamp,
            canonical_form=known.canonical_form,
            key=known.key,
            samples=known.samples,
        )

    def _decide(self, call: RequestContext) -> Plan:
        body = call.body
        model, stream, options = body.get("model"), body.get("stream"), body.get("stream_options")
        if not isinstance(model, str) or not model:
            raise InvalidRequest("`model` must be the name of a model: see /v1/models.", param="model")
        if stream is not None and not isinstance(stream, bool):
            raise InvalidRequest("`stream` must be true or false.", param="stream")
        if options is not None and (not isinstance(options, dict) or not stream):
            raise InvalidRequest("`stream_options` is an object and goes with `stream: true`.", param="stream_options")
        n = body.get("n")
        if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
            raise InvalidRequest("`n` must be a whole number from 1.", param="n")
        target = self._routes.resolve(model, self._local.entries, body)
        call.record.model, call.record.upstream = target.model, target.upstream
        call.record.model_known = target.versioned
        kind = self._local.entries.get(target.model, {}).get("kind") if target.versioned else None
        if kind and (kind == "embedding") != (call.endpoint == EMBEDDINGS):
            raise InvalidRequest(f"`{model}` is of kind {kind}, which {call.endpoint} does not take.", param="model")
        bypass = None if self._cache.enabled else "disabled"
        if call.cache_control.no_store:
            bypass = "no-store"
        if call.endpoint == RESPONSES:
            responses.check(body, target)
            bypass = bypass or "endpoint"
        bypass = bypass or entry.bypass_reason(
            call.endpoint,
            body,
            target.default_temperature.get(call.endpoint),
            target.store_sampled or call.store_sampled,
        )
        forward = "request" if call.cache_control.no_cache else "miss"
        stamp = self._cache.epoch(call.tenant, target.model)
        way = Plan(call, target, bool(stream), bool((options or {}).get("include_usage")), bypass, forward, stamp)
        if target.samples > 1 and bypass is None:
            kept_anyway = (
                entry.bypass_reason(call.endpoint, body, target.default_temperature.get(call.endpoint), False) is None
            )
            way.samples = 1 if kept_anyway else target.samples
        return way

    def canonical_form(self, way: Plan, revision: str | None, *, without: str = "") -> bytes:
        """The canonical form of the whole request, or of what is left `without` a field."""
        call, target = way.request, way.target
        if way.canonical_form and not without and revision == target.revision:
            return way.canonical_form
        body = {name: value for name, value in call.body.items() if name != without} if without else call.body
        return canonical.form(
            tenant=call.tenant,
            upstream=target.upstream,
            model=target.model,
            revision=revision,
            endpoint=call.endpoint,
            body=canonical.comparable(body, target.model, target.defaults.get(call.endpoint, {})),
        )

    def _key(self, way: Plan, revision: str | None, *, without: str = "") -> str:
        """The key of that form."""
        return canonical.key_of(self._cache.secret, self.canonical_form(way, revision, without=without))

    def input_keys(self, way: Plan, revision: str | None, inputs: Iterable[bytes]) -> list[str]:
        """One key for each canonical input."""
        return canonical.input_keys(self._cache.secret, self._key(way, revision, without="input"), inputs)

    def flight_name(self, way: Plan, key: str) -> str:
        """The name of the flight that this request may share; empty: none. Who has the same name wants the same of the
        upstream, and may have the same answer from the cache."""
        wishes = way.request.cache_control
        if way.bypass or not key or wishes.no_cache or wishes.only_if_cached:
            return ""
        mode = "stream" if way.stream else "json"
        if way.include_usage and not way.target.config.stream_usage:
            mode += ":usage"
        if wishes.max_age is not None:
            mode += f":{wishes.max_age}"
        stand_ins = [f":{each.upstream}/{each.model}" for each in way.targets[1:]]
        return ":".join((key, way.epoch, mode)) + "".join(stand_ins)
