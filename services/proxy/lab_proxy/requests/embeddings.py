"""Embeddings: one cache entry for each input. Cached vectors are reused, the missing ones are fetched."""

import time
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from .. import canonical
from ..cache import entry
from ..cache.entry import Entry
from ..cache.flight import Flight
from ..cache.key import with_input
from ..cache.store import Cache
from ..endpoints import ENDPOINTS
from ..errors import InvalidRequest, UpstreamBroken
from ..long_bodies import off_loop
from ..telemetry.record import UpstreamCall
from ..upstreams.failover import UpstreamPool
from ..upstreams.reply import UpstreamResponse
from .billing import Billing
from .completions import CompletionFetch
from .context import Plan
from .delivery import ResponseWriter
from .planner import Planner


@dataclass(slots=True)
class Inputs:
    """The distinct inputs of one embeddings request: as received, in canonical form, and their keys."""

    unique: list[Any]
    texts: list[bytes]
    keys: list[str]
    order: list[int]  # index of the distinct input at each position of the request

    @property
    def key(self) -> str:
        """The key of all inputs together, in the request's order."""
        if len(self.order) == 1:
            return self.keys[0]
        return sha256("".join(self.keys[place] for place in self.order).encode()).hexdigest()


class EmbeddingFetch:
    def __init__(
        self, cache: Cache, upstreams: UpstreamPool, planner: Planner, billing: Billing, completions: CompletionFetch
    ) -> None:
        self._cache, self._upstreams, self._planner = cache, upstreams, planner
        self._billing, self._completions = billing, completions

    def inputs(self, plan: Plan) -> Inputs | None:
        """The distinct inputs, in order of first appearance; None: the request is passed on unchanged. Raises
        InvalidRequest for too many inputs."""
        endpoint = ENDPOINTS[plan.request.endpoint]
        field, most = endpoint.input_field, endpoint.max_inputs
        units = entry.inputs(plan.request.body.get(field))
        if units and most is not None and len(units) > most:
            raise InvalidRequest(f"`{field}` has {len(units)} inputs; at most {most} are allowed.", param=field)
        if plan.bypass or units is None:
            return None
        encoded = [canonical.encode(unit) for unit in units]
        first = dict(zip(encoded, units, strict=True))
        places = {text: place for place, text in enumerate(first)}
        texts = list(first)
        keys = self._planner.input_keys(plan, plan.target.revision, texts)
        return Inputs(list(first.values()), texts, keys, [places[text] for text in encoded])

    async def serve(self, plan: Plan, inputs: Inputs, found: list[Entry], writer: ResponseWriter) -> None:
        """Answer from the cache alone."""
        record, now = plan.request.record, time.time()
        record.cache, record.model_known = "hit", True
        oldest = min(found, key=lambda each: each.ttl - each.age(now))
        headers = plan.hit_headers(oldest.ttl, oldest.age(now), inputs.keys[0] if len(inputs.keys) == 1 else None)
        body, usage = await self._join(found, inputs.order)
        record.set_usage(usage)
        return await writer.send(body, headers)

    async def fetch_missing(self, plan: Plan, inputs: Inputs, found: list[Entry | None], flight: Flight) -> None:
        """Fetch the vectors that are not in `found`, and store them."""
        record, unique = plan.request.record, inputs.unique
        missing = [place for place, kept in enumerate(found) if kept is None]
        # 1. Fetch the missing ones; or all, if the model's revision has changed since the found ones were stored.
        if len(missing) < len(unique):
            plan.forward = record.cache = "partial"
        asked = None if len(missing) == len(inputs.order) else [unique[place] for place in missing]
        raw, answer, response = await self.fetch(plan, asked)
        known, revision = self._completions.revision(plan, response)
        if response.target is not plan.target or (known and revision != plan.target.revision):
            plan.target = replace(response.target, revision=revision)
            if len(missing) < len(unique):
                plan.forward = record.cache = "miss"
                missing = list(range(len(unique)))
                fallback = {name: value for name, value in response.headers.items() if name == "x-model-fallback"}
                raw, answer, response = await self.fetch(plan, unique)
                response.headers |= fallback
                if response.revision != revision:
                    raise UpstreamBroken("The model's revision changed twice during this request: retry.")
        size = max(len(raw), len(plan.request.raw))
        written = await off_loop(size, self._keyed_entries, plan, inputs, missing, answer, revision)
        for place, made in zip(missing, written.values(), strict=True):
            found[place] = made
        # 2. Store them under the revision of the answer.
        outcome = (None if plan.bypass else await self._cache.write(written) or "stored") if known else "revision"
        body, usage = await self._join([e for e in found if e], inputs.order)
        record.set_usage(usage)
        flight.begin({"streams": False, "headers": response.headers, "usage": usage})
        flight.add_whole(raw if asked is None else body)
        flight.end(outcome)

    def _keyed_entries(
        self, plan: Plan, inputs: Inputs, places: list[int], answer: Any, revision: str | None
    ) -> dict[str, Entry]:
        """The entries of the inputs at `places`, in their order, by their keys. Raises UpstreamBroken."""
        texts = [inputs.texts[place] for place in places]
        fresh = self.entries(plan, answer, [inputs.unique[place] for place in places])
        rest = self._planner.canonical_form(plan, revision, without=ENDPOINTS[plan.request.endpoint].input_field)
        for text, made in zip(texts, fresh, strict=True):
            made.attach_request(with_input(rest, text), 0)
        return dict(zip(self._planner.input_keys(plan, revision, texts), fresh, strict=True))

    async def _join(self, kept: list[Entry], order: list[int]) -> tuple[bytes, dict[str, Any]]:
        return await off_loop(sum(each.weight for each in kept), self.join, kept, order)

    async def fetch(self, plan: Plan, units: list[Any] | None) -> tuple[bytes, Any, UpstreamResponse]:
        """The upstream's answer for `units`; None: for the request as received."""
        request, body = plan.request, self._completions.renamed_body(plan)
        answer: Any = None
        if units is not None:
            asked = request.body | {ENDPOINTS[request.endpoint].input_field: units}
            body = lambda target: canonical.dump(asked | {"model": target.model})  # noqa: E731 - like the one above

        def on_call(call: UpstreamCall) -> None:
            self._billing.add_call(request, call, answer.get("usage") if isinstance(answer, dict) else None, 0)

        call = self._completions.upstream_request(plan, body, on_call)
        with closing(await self._upstreams.send(plan.targets, call)) as response:
            request.record.model_known = request.record.upstream_called = True
            raw, answer = await response.json()
            return raw, answer, response

    def entries(self, plan: Plan, answer: Any, units: list[Any]) -> list[Entry]:
        """One entry for each of `units`. Raises UpstreamBroken for an answer of another shape."""
        try:
            return entry.of_vectors(answer, units, plan.target.ttl, time.time(), plan.epoch)
        except (ValueError, TypeError):  # a TypeError: nested too deep for orjson
            name = plan.target.upstream
            raise UpstreamBroken(f"The upstream `{name}` did not answer with one vector for each input.") from None

    def join(self, kept: list[Entry], order: list[int]) -> tuple[bytes, dict[str, Any]]:
        """One answer from single entries, and its usage. `order`: index of the entry of each input."""
        return entry.to_vectors(kept, order)
