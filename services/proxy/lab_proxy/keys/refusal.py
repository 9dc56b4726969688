"""Refusals: the error, its message and its headers for each verdict of limits.lua. Knows no redis."""

import math
from collections.abc import Mapping

from ..errors import BudgetExceeded, LimitReached, ProxyError
from ..ledger import money
from .identity import CapShare, Identity

_DAY, _TOTAL, _SLOTS, _REQUESTS, _TOKENS, _TOO_LARGE, _SHARE_REQUESTS, _SHARE_TOKENS, _SHARE_DAY = range(1, 10)
NAMES = ("", "budget_day", "budget_total", "concurrency", "rpm", "tpm", "tpm", "rpm_share", "tpm_share", "day_share")
"""By verdict: the name of the limit, for metrics."""


def duration(microseconds: int) -> str:
    """In the form of OpenAI's headers: `120ms`, `7.66s`, `6m0s`, `1h2m3s`; rounded up to a millisecond."""
    ms = math.ceil(microseconds / 1000)
    if ms < 1000:
        return f"{ms}ms" if ms else "0s"
    minutes, rest = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    seconds = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{f'{hours}h' if hours else ''}{f'{minutes}m' if hours or minutes else ''}{seconds}s"


def refusal(
    who: Identity, verdict: int, headers: Mapping[str, str], *, wait: int, now: int, left: int, requested: int
) -> ProxyError:
    """The error of a verdict that is not 0. `headers`: of the answer. `wait` and `now` in microseconds, `left` and
    `requested` in tokens."""
    headers = dict(headers)
    if isinstance(who, CapShare):
        return _cap_refusal(who, verdict, wait=wait, now=now, requested=requested)
    if verdict == _TOTAL:
        budget = money.shown(who.budget_total or 0)
        return BudgetExceeded(f"This key's budget of {budget} USD is spent.", headers=headers)
    if verdict == _DAY:
        headers["retry-after"] = str(86400 - now // 1_000_000 % 86400)
        why = f"{money.shown(who.budget_day or 0)} USD per day is spent: it starts again at midnight UTC."
        return BudgetExceeded(f"This key's budget of {why}", headers=headers)
    if verdict == _TOO_LARGE:  # a retry does not help
        why = f"Limit {who.tpm}, Requested {requested}. Ask for fewer tokens."
        return LimitReached(f"Request too large for this key on tokens per min (TPM): {why}", "tokens", headers)
    headers["retry-after"] = str(math.ceil(wait / 1e6))
    headers["retry-after-ms"] = str(math.ceil(wait / 1000))
    kind, why = {
        _SLOTS: ("requests", f"concurrent requests: Limit {who.concurrency}."),
        _REQUESTS: ("requests", f"requests per min (RPM): Limit {who.rpm}."),
        _TOKENS: ("tokens", f"tokens per min (TPM): Limit {who.tpm}, Left {left}, Requested {requested}."),
    }[verdict]
    why += f" Please try again in {duration(wait)}."
    return LimitReached(f"Rate limit reached for this key on {why}", kind, headers)


def _cap_refusal(who: CapShare, verdict: int, *, wait: int, now: int, requested: int) -> ProxyError:
    """The error for a cap. It has no x-ratelimit-… headers: those describe the caller's key."""
    day = f"{money.shown(who.budget_day or 0)} USD per day"
    whose = f"of all keys together for the upstream `{who.upstream}`"
    if verdict in {_DAY, _SHARE_DAY}:
        part = "This key has spent its share of the budget" if verdict == _SHARE_DAY else "The budget"
        why = f"{part} {whose}, {day}: it starts again at midnight UTC."
        return BudgetExceeded(why, headers={"retry-after": str(86400 - now // 1_000_000 % 86400)})
    kind, limit = "requests", f"requests per min (RPM): Limit {who.rpm}"
    if verdict in {_TOKENS, _TOO_LARGE, _SHARE_TOKENS}:
        kind, limit = "tokens", f"tokens per min (TPM): Limit {who.tpm}, Requested {requested}"
    if verdict == _TOO_LARGE:  # a retry does not help
        return LimitReached(f"Request too large for the limit {whose} on {limit}. Ask for fewer tokens.", kind, {})
    own = verdict in {_SHARE_REQUESTS, _SHARE_TOKENS}
    part = "This key has used its share of the limit" if own else "Limit reached"
    headers = {"retry-after": str(math.ceil(wait / 1e6)), "retry-after-ms": str(math.ceil(wait / 1000))}
    return LimitReached(f"{part} {whose} on {limit}. Please try again in {duration(wait)}.", kind, headers)
