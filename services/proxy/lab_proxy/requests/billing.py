"""Billing: each upstream call is charged by its usage; each hit and each shared answer is recorded with what it saved.

Decides when a charge is recorded and when it is corrected. Knows no prices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from ..endpoints import ENDPOINTS
from ..ledger.ledger import Charge, Ledger, day_of
from ..ledger.reconciliation import Reconciliation, TokenUsage
from ..ledger.usage import NOBODY
from ..telemetry.record import UpstreamCall, token_count
from .context import RequestContext


class Billing:
    def __init__(self, ledger: Ledger, reconciliation: Reconciliation, is_local: Callable[[str], bool]) -> None:
        """`reconciliation` reports the real usage of interrupted calls. `is_local`: an upstream that is not paid, whose
        batches cost half; a line of a batch at another one is a call like any other, at its full price."""
        self._is_local = is_local
        self._ledger, self._reconciliation = ledger, reconciliation

    def close_request(self, request: RequestContext) -> None:
        """The request has ended: charge what it got without an upstream call of its own."""
        ledger, record, endpoint = self._ledger, request.record, ENDPOINTS[request.endpoint]
        charge = self._charge(request, record.upstream, record.model)
        if record.upstream_called:
            # `add_call` charges upstream calls. Some inputs of the answer may have come from the cache.
            saved = max(0, record.prompt_tokens - record.billed_prompt)
            completion = max(0, record.completion_tokens - (record.billed_tokens - record.billed_prompt))
            if endpoint.per_input and record.billed_tokens and saved + completion:
                charge.source, charge.prompt, charge.completion, charge.request = "hit", saved, completion, False
                ledger.record(charge)
            if endpoint.billing == "call":
                return
        elif record.cache in {"hit", "stale"}:
            charge.source = "hit"
        elif record.cache == "collapsed" and record.prompt_tokens + record.completion_tokens:
            charge.source = "collapsed"
        else:
            return
        charge.prompt, charge.completion = record.prompt_tokens, record.completion_tokens
        charge.cached = record.cached_tokens
        if charge.source == "upstream" and not charge.prompt + charge.completion:  # it broke off before its usage
            charge.prompt, charge.estimated = len(request.raw) // 4, True
        ledger.record(charge)

    def add_call(self, request: RequestContext, call: UpstreamCall, usage: Any, chunks: int) -> None:
        """Record an upstream call at its end. It is charged by its reported `usage`, or estimated by its `chunks` until
        reconciliation. A call without an answer is charged only by reconciliation."""
        record = request.record
        record.add_call(call)
        if not (call.answered or call.possibly_processed):
            return call.count_tokens(0)
        charge = self._charge(request, call.upstream, call.model)
        if isinstance(usage, dict):
            charge.prompt = token_count(usage, "prompt_tokens")
            charge.completion = token_count(usage, "completion_tokens")
            charge.cached = token_count(usage.get("prompt_tokens_details"), "cached_tokens")
        else:
            charge.prompt, charge.completion, charge.estimated = len(request.raw) // 4, chunks, True
        if call.answered:
            record.billed_tokens += charge.prompt + charge.completion
            record.billed_prompt += charge.prompt
            self._ledger.record(charge)
        call.count_tokens(charge.prompt + charge.completion if call.answered else 0)
        if charge.estimated and call.id:
            self._reconciliation.enqueue(call.id, partial(self._reconcile, request, call, charge))
        if request.admission is not None:
            # The caller may have disconnected before its followers, or before the call was cancelled.
            request.admission.correct(record.upstream_tokens)
        return None

    def _reconcile(self, request: RequestContext, call: UpstreamCall, charge: Charge, usage: TokenUsage) -> None:
        """The model service has reported the usage of an interrupted call."""
        record, tokens = request.record, usage.prompt + usage.completion
        call.count_tokens(tokens)
        if call.answered:
            record.billed_tokens += tokens - charge.prompt - charge.completion
            self._ledger.correct(charge, *usage)
        elif tokens:
            record.billed_tokens += tokens
            made = self._charge(request, call.upstream, call.model)
            made.prompt, made.completion, made.cached = usage
            made.day = day_of(call.began)
            self._ledger.record(made)
        if request.admission is not None:
            request.admission.correct(record.upstream_tokens)

    def _charge(self, request: RequestContext, upstream: str, model: str) -> Charge:
        who = request.identity
        half = request.batch_price and self._is_local(upstream)
        return Charge(who.key_id or NOBODY, who.owner, upstream, model, "upstream", batch_price=half)
