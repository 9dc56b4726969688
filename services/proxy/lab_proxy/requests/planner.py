"""Plan of a request: model, upstream, cache key, whether it may be cached, and which requests may share its answer.

Knows routes, defaults and earlier plans. Calls nobody, except to refresh the model list for an unknown name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .. import canonical
from ..cache import entry
from ..cache.key import canonical_form, comparable, input_keys, key_of, sample_key, with_input
from ..cache.policy import bypass_reason
from ..cache.store import Cache, NoCache
from ..endpoints import ENDPOINTS, Endpoint
from ..errors import InvalidRequest, ModelNotAllowed, ModelNotFound
from ..upstreams.model_list import ModelList
from ..upstreams.routes import Routes, Target
from .context import RequestContext
from .plan_cache import CachedPlan, PlanCache


@dataclass(slots=True)
class Plan:
    """How one request is answered. Some fields change while it is carried out."""

    request: RequestContext
    target: Target
    stream: bool
    include_usage: bool
    bypass: str | None  # why the cache is not used
    forward: str = "miss"  # why the upstream is called: `fwd` of cache-status
    epoch: str = ""  # at the beginning of the request: its answer is stored in this epoch
    canonical_form: bytes = b""  # with the target's revision
    limits_checked: bool = False
    retried_at: float = 0.0  # time.perf_counter() of a second upstream call, made for the followers
    key: str = ""  # of `canonical_form`; empty for a bypass and for endpoints with one entry per input
    samples: int = 1  # answers that are stored side by side
    slot: int = 0  # which of them this request's answer becomes
    shareable: bool = False  # other requests may join its flight

    @property
    def keys(self) -> list[str]:
        """The key of each sample; the first one is the request's own."""
        return [sample_key(self.key, slot) for slot in range(self.samples)]

    @property
    def _alias(self) -> dict[str, str]:
        headers = {"x-model-alias": self.target.alias} if self.target.alias else {}
        return headers | {"x-model-auto": self.target.auto} if self.target.auto else headers

    def miss_headers(self, outcome: str | None = None) -> dict[str, str]:
        """Headers of an answer from an upstream. `outcome`: `stored`, or why it was not."""
        if self.bypass:
            status = f"llm-lab; fwd=bypass; detail={self.bypass}"
        else:
            end = {None: "", "stored": "; stored"}.get(outcome, f"; detail={outcome}")
            status = f"llm-lab; fwd={self.forward}{end}"
        return {"cache-status": status, **self._alias}

    def collapsed_headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Headers of an answer that another request's upstream call gives; `headers`: of that call."""
        kept = {name: headers[name] for name in ("x-model-revision", "x-model-fallback") if name in headers}
        return {"cache-status": f"llm-lab; fwd={self.forward}; collapsed", **kept, **self._alias}

    def hit_headers(self, ttl: int, age: int, key: str | None, failed: int | None = None) -> dict[str, str]:
        """Headers of an answer from the cache. `failed`: status of the failed call that a stale entry replaces."""
        status = f"llm-lab; hit; ttl={ttl - age}" + (f'; key="{key}"' if key else "")
        if failed is not None:
            status = f"llm-lab; fwd=stale; fwd-status={failed}"
        revision = {"x-model-revision": self.target.revision} if self.target.revision else {}
        return {"cache-status": status, "age": str(age), **revision, **self._alias}

    @property
    def targets(self) -> list[Target]:
        """The target and the fallbacks that this caller may use."""
        allows = self.request.identity.allows
        return [self.target, *(each for each in self.target.fallbacks if allows(each.model))]


@dataclass(frozen=True, slots=True)
class Preview:
    """What the cache would do with a request."""

    canonical_form: bytes
    keys: list[str]
    epoch: str
    bypass: str | None


def check_permission(request: RequestContext, target: Target) -> None:
    """Raises ModelNotAllowed."""
    if not request.identity.allows(target.model, *([target.alias] if target.alias else [])):
        raise ModelNotAllowed(f"This key is not for the model `{target.alias or target.model}`.", param="model")


class Planner:
    """Makes the plan of each request."""

    def __init__(self, cache: Cache | NoCache, routes: Routes, models: ModelList) -> None:
        self._cache = cache
        self._routes = routes
        self._models = models
        self._plan_cache = PlanCache()

    def cached_plan(self, tenant: str, endpoint: str, raw: bytes) -> CachedPlan | None:
        """The plan of an earlier request with the same bytes, if it is still valid."""
        return self._plan_cache.get((tenant, endpoint, raw), self._generation)

    @property
    def _generation(self) -> tuple[int, int]:
        return self._routes.generation, self._models.generation

    def resolve_alias(self, name: str) -> str:
        """The model behind a name."""
        return self._routes.aliases(self._models.entries).get(name, name)

    async def plan(self, request: RequestContext) -> Plan:
        """The plan of a request. Raises InvalidRequest, ModelNotFound or UpstreamDown."""
        if request.cached_plan is not None:
            return self._replan(request, request.cached_plan)
        try:
            generation, plan = self._generation, self._make(request)
        except ModelNotFound as unknown:
            # Loaded since the last poll, or still loading: only the model service knows.
            await self._models.refresh(unknown.model)
            generation, plan = self._generation, self._make(request)
        if plan.bypass is None and not ENDPOINTS[request.endpoint].per_input:
            plan.canonical_form = self.canonical_form(plan, plan.target.revision)
            plan.key = key_of(self._cache.secret, plan.canonical_form)
        if request.plan_cacheable:
            cached = CachedPlan(
                request.body,
                plan.target,
                plan.stream,
                plan.include_usage,
                plan.bypass,
                plan.canonical_form,
                plan.key,
                plan.samples,
            )
            self._plan_cache.put((request.tenant, request.endpoint, request.raw), cached, generation)
        return plan

    async def preview(self, request: RequestContext) -> Preview:
        """What the cache would do with `request`. Calls no upstream. Raises like `plan`, and ModelNotAllowed."""
        plan = await self.plan(request)
        check_permission(request, plan.target)
        endpoint, revision = ENDPOINTS[request.endpoint], plan.target.revision
        units = entry.inputs(request.body.get(endpoint.input_field)) if endpoint.per_input else None
        if units is None:
            form = self.canonical_form(plan, revision)
            keys = plan.keys if plan.key else [key_of(self._cache.secret, form)]
            return Preview(form, keys, plan.epoch, plan.bypass)
        texts = list(dict.fromkeys(canonical.encode(unit) for unit in units[: endpoint.max_inputs]))
        form = with_input(self.canonical_form(plan, revision, without=endpoint.input_field), b",".join(texts))
        return Preview(form, self.input_keys(plan, revision, texts), plan.epoch, plan.bypass)

    def _replan(self, request: RequestContext, cached: CachedPlan) -> Plan:
        target, record = cached.target, request.record
        record.model, record.upstream, record.model_known = target.model, target.upstream, target.versioned
        return Plan(
            request,
            target,
            cached.stream,
            cached.include_usage,
            cached.bypass,
            epoch=self._cache.epoch(request.tenant, target.model),
            canonical_form=cached.canonical_form,
            key=cached.key,
            samples=cached.samples,
        )

    def _make(self, request: RequestContext) -> Plan:
        body, endpoint, record = request.body, ENDPOINTS[request.endpoint], request.record
        # 1. The fields that the proxy itself reads.
        if endpoint.default_kinds and body.get("model") is None and (name := self._default_model(endpoint)):
            body = request.body = body | {"model": name}
            request.raw = canonical.dump(body)
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
        # 2. The target.
        target = self._routes.resolve(model, self._models.entries, body)
        record.model, record.upstream, record.model_known = target.model, target.upstream, target.versioned
        kind = self._models.entries.get(target.model, {}).get("kind") if target.versioned else None
        if kind and kind not in endpoint.kinds:
            raise InvalidRequest(f"`{model}` is of kind {kind}, which {endpoint.path} does not take.", param="model")
        # 3. The cache.
        bypass = None if self._cache.enabled else "disabled"
        if request.cache_control.no_store:
            bypass = "no-store"
        if endpoint.handler == "responses":
            _check_responses(body, target)
        if not endpoint.cacheable:
            bypass = bypass or "endpoint"
        temperature = target.default_temperature.get(endpoint.path)
        bypass = bypass or bypass_reason(
            endpoint.path, body, temperature, target.store_sampled or request.store_sampled
        )
        forward = "request" if request.cache_control.no_cache else "miss"
        epoch = self._cache.epoch(request.tenant, target.model)
        plan = Plan(request, target, bool(stream), bool((options or {}).get("include_usage")), bypass, forward, epoch)
        if target.samples > 1 and bypass is None:
            deterministic = bypass_reason(endpoint.path, body, temperature, store_sampled=False) is None
            plan.samples = 1 if deterministic else target.samples
        return plan

    def _default_model(self, endpoint: Endpoint) -> str | None:
        """The first listed model of the first kind that there is; None: there is none."""
        listed = self._models.entries
        of_kind = (name for kind in endpoint.default_kinds for name in listed if listed[name].get("kind") == kind)
        return next(of_kind, None)

    # ---- keys

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
            body=comparable(body, target.model, target.defaults.get(request.endpoint, {})),
        )

    def input_keys(self, plan: Plan, revision: str | None, inputs: Iterable[bytes]) -> list[str]:
        """One key for each canonical input."""
        field = ENDPOINTS[plan.request.endpoint].input_field
        rest = key_of(self._cache.secret, self.canonical_form(plan, revision, without=field))
        return input_keys(self._cache.secret, rest, inputs)

    def flight_name(self, plan: Plan, key: str) -> str:
        """The name of the flight that this request may share; empty: none.

        Requests with the same name need the same upstream call, and accept the same entry of the cache.
        """
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


def _check_responses(body: Mapping[str, Any], target: Target) -> None:
    """Raises InvalidRequest for a Response that the proxy cannot pass through."""
    if not target.config.responses:
        raise InvalidRequest(
            f"`{target.model}` is served by `{target.upstream}`, which has no Responses API: "
            "use /v1/chat/completions, or another model.",
            param="model",
        )
    if body.get("background"):
        raise InvalidRequest(
            "`background` is not supported: its answer is fetched later, and the proxy hands out no kept answers.",
            param="background",
        )
