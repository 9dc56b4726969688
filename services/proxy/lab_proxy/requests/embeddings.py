"""Embeddings: a request's inputs one by one, what is known of them from the cache, and the rest from the upstream."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from .. import canonical
from ..cache import entry
from ..cache.entry import Entry
from ..cache.flight import Flight
from ..errors import InvalidRequest, UpstreamBroken
from ..upstreams.client import UpstreamCall, UpstreamPool, UpstreamResponse
from .billing import Billing
from .completions import CompletionFetch
from .planner import MOST_INPUTS, Plan, Planner
from .roles import ResponseWriter, Store


@dataclass(slots=True)
class Inputs:
    """The inputs of one embeddings request, each different one once: as given, in canonical form, and their keys."""

    unique: list[Any]
    texts: list[bytes]
    keys: list[str]
    order: list[int]  # which of them stands at each place of the request

    @property
    def key(self) -> str:
        """Of all of them, as the request has them."""
        if len(self.order) == 1:
            return self.keys[0]
        return sha256("".join(self.keys[place] for place in self.order).encode()).hexdigest()


class EmbeddingFetch:
    def __init__(
        self, cache: Store, upstreams: UpstreamPool, ways: Planner, bills: Billing, fetching: CompletionFetch
    ) -> None:
        self._cache = cache
        self._upstreams = upstreams
        self._planner = ways
        self._billing = bills
        self._completions = fetching

    def inputs(self, way: Plan) -> Inputs | None:
        """Each different input once, in the order of its first appearance; None: the request goes as it is.

        Raises InvalidRequest for too many.
        """
        units = entry.inputs(way.request.body.get("input"))
        if units and len(units) > MOST_INPUTS:
            raise InvalidRequest(f"`input` holds {len(units)} inputs: at most {MOST_INPUTS} at once.", param="input")
        if way.bypass or units is None:
            return None
        given = [canonical.encode(unit) for unit in units]
        first = dict(zip(given, units, strict=True))
        places = {text: place for place, text in enumerate(first)}
        texts = list(first)
        keys = self._planner.input_keys(way, way.target.revision, texts)
        return Inputs(list(first.values()), texts, keys, [places[text] for text in given])

    async def serve(self, way: Plan, inputs: Inputs, found: list[Entry], out: ResponseWriter) -> None:
        """All of them from the cache."""
        account, now = way.request.record, time.time()
        account.cache, account.model_known = "hit", True
        oldest = min(found, key=lambda each: each.ttl - each.age(now))
        headers = way.hit_headers(oldest.ttl, oldest.age(now), inputs.keys[0] if len(inputs.keys) == 1 else None)
        body, usage = entry.to_vectors(found, inputs.order)
        account.set_usage(usage)
        return await out.send(body, headers)

    async def fetch_missing(self, way: Plan, inputs: Inputs, found: list[Entry | None], flight: Flight) -> None:
        """Those that are not `found`."""
        account, unique, texts = way.request.record, inputs.unique, inputs.texts
        missing = [place for place, kept in enumerate(found) if kept is None]
        # 1. What is missing; everything, should the model have changed under the vectors that were found.
        if len(missing) < len(unique):
            way.forward = account.cache = "partial"
        asked = None if len(missing) == len(inputs.order) else [unique[place] for place in missing]
        raw, answer, reply = await self.fetch(way, asked)
        known, revision = self._completions.revision(way, reply)
        if reply.target is not way.target or (known and revision != way.target.revision):
            way.target = replace(reply.target, revision=revision)
            if len(missing) < len(unique):
                way.forward = account.cache = "miss"
                missing = list(range(len(unique)))
                stands_in = {name: said for name, said in reply.headers.items() if name == "x-model-fallback"}
                raw, answer, reply = await self.fetch(way, unique)
                reply.headers |= stands_in
                if reply.revision != revision:
                    raise UpstreamBroken("The model changed twice while it answered: ask again.")
        fresh = self._entries(way, answer, [unique[place] for place in missing])
        rest = self._planner.canonical_form(way, revision, without="input")
        for place, made in zip(missing, fresh, strict=True):
            made.attach_request(canonical.with_input(rest, texts[place]), 0)
        for place, made in zip(missing, fresh, strict=True):
            found[place] = made
        # 2. Stored under the revision that the answer carries.
        written = dict(zip(self._planner.input_keys(way, revision, [texts[p] for p in missing]), fresh, strict=True))
        outcome = (None if way.bypass else await self._cache.write(written) or "stored") if known else "revision"
        body, usage = entry.to_vectors([e for e in found if e], inputs.order)
        account.set_usage(usage)
        flight.begin({"streams": False, "headers": reply.headers, "usage": usage})
        await flight.append(raw if asked is None else body)
        flight.end(outcome)

    async def fetch(self, way: Plan, units: list[Any] | None) -> tuple[bytes, Any, UpstreamResponse]:
        """The upstream's answer for `units`; None: for the request as it came."""
        call, body = way.request, self._completions.renamed_body(way)
        answer: Any = None
        if units is not None:
            asked = call.body | {"input": units}
            body = lambda target: canonical.dump(asked | {"model": target.model})  # noqa: E731 - as the one above

        def called(real: UpstreamCall) -> None:
            call.record.add_call(real)
            if real.answered or real.possibly_processed:
                self._billing.add_call(call, real, answer.get("usage") if isinstance(answer, dict) else None, 0)

        question = replace(self._completions.upstream_request(way, body), on_call=called)
        async with self._upstreams.send(way.targets, question) as reply:
            call.record.model_known = call.record.upstream_called = True
            raw, answer = await reply.json()
            return raw, answer, reply

    def _entries(self, way: Plan, answer: Any, units: list[Any]) -> list[Entry]:
        try:
            return entry.of_vectors(answer, units, way.target.ttl, time.time(), way.epoch)
        except ValueError:
            raise UpstreamBroken(f"The upstream `{way.target.upstream}` did not answer one vector per input.") from None
