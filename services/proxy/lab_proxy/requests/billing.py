"""What a request costs: each real call by what its upstream used, each answer that cost none as what it saved.

Owns when something is written into the ledger, and what of it is put right later. Knows nothing of prices.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from ..cache.entry import EMBEDDINGS
from ..ledger.ledger import Charge, day_of
from ..ledger.reconciliation import Reconciliation, TokenUsage
from ..upstreams.client import UpstreamCall
from .context import RequestContext
from .responses import RESPONSES
from .roles import Recorder


class Billing:
    def __init__(self, ledger: Recorder | None, tally: Reconciliation | None) -> None:
        """`tally`: who asks the model what calls that broke off really used."""
        self._ledger = ledger
        self._reconciliation = tally

    def close_request(self, call: RequestContext) -> None:
        """The request is over: what it got without a call of its own."""
        account = call.record
        source: Literal["upstream", "hit", "collapsed"]
        if account.upstream_called:
            # Real calls are billed at their end, by `bill`; some vectors of the answer may come from the cache.
            saved = account.prompt_tokens - account.billed_tokens
            if self._ledger is not None and call.endpoint == EMBEDDINGS and account.billed_tokens and saved > 0:
                who, half = call.identity, call.batch_price
                self._ledger.record(
                    Charge(who, account.upstream, account.model, "hit", saved, request=False, half=half)
                )
            if call.endpoint != RESPONSES:
                return
            source = "upstream"
        elif account.cache in {"hit", "stale"}:
            source = "hit"
        elif account.cache == "collapsed" and account.prompt_tokens + account.completion_tokens:
            source = "collapsed"
        else:
            return
        if self._ledger is not None:
            prompt, completion, cached = account.prompt_tokens, account.completion_tokens, account.cached_tokens
            untold = source == "upstream" and not prompt + completion  # a Response that broke off before its usage
            self._ledger.record(
                Charge(
                    call.identity, account.upstream, account.model, source, len(call.raw) // 4 if untold else prompt,
                    completion, cached, estimated=untold, half=call.batch_price,
                )
            )  # fmt: skip

    def add_call(self, call: RequestContext, real: UpstreamCall, usage: Any, pieces: int) -> None:
        """One real call, by the usage that its upstream told, else by the pieces that came of it until the model tells
        more. One that was not answered costs what the model tells."""
        if self._ledger is None:
            return
        account = call.record
        if isinstance(usage, dict):
            prompt, completion = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
            cached = _count(usage.get("prompt_tokens_details"), "cached_tokens")
        else:
            prompt, completion, cached = len(call.raw) // 4, pieces, 0
        charge = Charge(
            call.identity, real.upstream, real.model, "upstream", prompt, completion, cached,
            estimated=not isinstance(usage, dict), half=call.batch_price,
        )  # fmt: skip
        if real.answered:
            account.billed_tokens += prompt + completion
            self._ledger.record(charge)
        if charge.estimated and real.id and self._reconciliation is not None:
            self._reconciliation.enqueue(real.id, partial(self._reconcile, call, real, charge))
        elif call.admission is not None:
            call.admission.correct(account.upstream_tokens)  # who asked may have left before those who wanted the same

    def _reconcile(self, call: RequestContext, real: UpstreamCall, charge: Charge, used: TokenUsage) -> None:
        """The model has told what a call that broke off really used."""
        if self._ledger is None:
            return
        account, tokens = call.record, used.prompt + used.completion
        if real.answered:
            account.billed_tokens += tokens - charge.prompt - charge.completion
            self._ledger.correct(charge, *used)
        elif tokens:
            account.billed_tokens += tokens
            day = day_of(real.began)
            self._ledger.record(
                Charge(call.identity, real.upstream, real.model, "upstream", *used, half=call.batch_price, day=day)
            )
        if call.admission is not None:
            call.admission.correct(account.upstream_tokens)


def _count(usage: Any, name: str) -> int:
    """A count of tokens as an upstream told it; 0 for nonsense."""
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and value > 0 else 0
