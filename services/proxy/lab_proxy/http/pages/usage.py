"""Usage pages: a caller's own usage at /usage, all usage at /admin/usage. Knows HTTP; the ledger has the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any

import orjson

from ...errors import InvalidRequest
from ...ledger import money
from ...ledger.ledger import Ledger
from ...ledger.usage import MAX_DAYS, NOBODY, as_csv, total
from ..guards import OperatorGuard, read_query, with_redis
from ..response import PageRequest, Pages, Response

PRIVATE = {"cache-control": "no-store"}
DEFAULT_DAYS = 30
_FILTERS = frozenset({"from", "to", "owner", "model", "key_id", "format"})


class UsagePages:
    def __init__(self, ledger: Ledger, guard: OperatorGuard) -> None:
        self._ledger, self._guard = ledger, guard

    def pages(self) -> Pages:
        return {
            ("GET", "/usage"): with_redis(self._own),
            ("GET", "/admin/usage"): self._guard.protect(self._all),
        }

    async def _own(self, request: PageRequest, response: Response) -> None:
        who = request.identity
        filters = read_query(request, _FILTERS - {"owner", "key_id"})
        first, last = _range(filters)
        await self._ledger.flush()
        key_id = who.key_id or NOBODY
        rows = await self._ledger.usage(first, last, key_id=key_id, model=filters.get("model"))
        if _wants_csv(filters):
            return await _send_csv(response, rows)
        spent_today, spent_total = await self._ledger.spent(key_id)
        answer = {
            "key_id": who.key_id,
            "owner": who.owner,
            "limits": {name: getattr(who, name) for name in ("rpm", "tpm", "concurrency", "models")},
            "budget_usd": {
                "per_day": _budget(who.budget_day, spent_today),
                "total": _budget(who.budget_total, spent_total),
            },
        }
        return await response.send(orjson.dumps(answer | _report(first, last, rows)), PRIVATE)

    async def _all(self, request: PageRequest, response: Response) -> None:
        filters = read_query(request, _FILTERS)
        first, last = _range(filters)
        await self._ledger.flush()
        rows = await self._ledger.usage(
            first, last, key_id=filters.get("key_id"), owner=filters.get("owner"), model=filters.get("model")
        )
        if _wants_csv(filters):
            return await _send_csv(response, rows)
        return await response.send(orjson.dumps(_report(first, last, rows)), PRIVATE)


def _range(filters: Mapping[str, str]) -> tuple[date, date]:
    days = {}
    for name in ("from", "to"):
        try:
            days[name] = date.fromisoformat(filters[name]) if name in filters else None
        except ValueError:
            raise InvalidRequest(f"`{name}` is a day, as 2026-11-23.", param=name) from None
    last = days["to"] or datetime.now(UTC).date()
    first = days["from"] or last - timedelta(days=DEFAULT_DAYS - 1)
    if not timedelta(0) <= last - first < timedelta(days=MAX_DAYS):
        raise InvalidRequest(f"`from` to `to` are 1 to {MAX_DAYS} days.", param="from")
    return first, last


def _wants_csv(filters: Mapping[str, str]) -> bool:
    form = filters.get("format", "json")
    if form not in {"json", "csv"}:
        raise InvalidRequest("`format` is json or csv.", param="format")
    return form == "csv"


def _report(first: date, last: date, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"from": first.isoformat(), "to": last.isoformat(), "total": total(rows), "rows": rows}


def _budget(limit: int | None, spent: int) -> dict[str, float | None]:
    return {
        "limit": None if limit is None else float(money.to_usd(limit)),
        "spent": float(money.to_usd(spent)),
        "left": None if limit is None else float(money.to_usd(max(0, limit - spent))),
    }


async def _send_csv(response: Response, rows: list[dict[str, Any]]) -> None:
    headers = PRIVATE | {"content-disposition": 'attachment; filename="usage.csv"'}
    await response.send(as_csv(rows).encode(), headers, "text/csv; charset=utf-8")
