"""Usage pages: a caller's own usage at /usage, all usage at /admin/usage. Knows HTTP; the ledger has the numbers."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any

import orjson

from ...errors import InvalidRequest
from ...ledger import money
from ...ledger.ledger import Ledger
from ...ledger.usage import MAX_DAYS, NOBODY, as_csv, row_id
from ..guards import read_query
from ..response import PRIVATE, PageRequest, Pages, Response, read_limit

DEFAULT_DAYS = 30
DEFAULT_ROWS, MAX_ROWS = 1000, 10_000  # rows per page; a row has about 600 bytes
_FILTERS = frozenset({"from", "to", "owner", "model", "key_id", "format", "limit", "after"})


class UsagePages:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def pages(self) -> Pages:
        return {("GET", "/usage"): self._own, ("GET", "/admin/usage"): self._all}

    async def _own(self, request: PageRequest, response: Response) -> None:
        who, filters = request.identity, read_query(request, _FILTERS - {"owner", "key_id"})
        key_id = who.key_id or NOBODY
        await self._ledger.flush()
        today, whole = await self._ledger.spent(key_id)
        about = {
            "key_id": who.key_id,
            "owner": who.owner,
            "limits": {name: getattr(who, name) for name in ("rpm", "tpm", "concurrency", "models")},
            "budget_usd": {"per_day": _budget(who.budget_day, today), "total": _budget(who.budget_total, whole)},
        }
        await self._send(response, filters | {"key_id": key_id}, about)

    async def _all(self, request: PageRequest, response: Response) -> None:
        filters = read_query(request, _FILTERS)
        await self._ledger.flush()
        await self._send(response, filters, {})

    async def _send(self, response: Response, filters: Mapping[str, str], about: dict[str, Any]) -> None:
        """The rows as JSON, after `about`, or as CSV."""
        first, last = _range(filters)
        form = filters.get("format", "json")
        if form not in {"json", "csv"}:
            raise InvalidRequest("`format` must be json or csv.", param="format")
        chosen = {name: filters.get(name) for name in ("key_id", "owner", "model")}
        limit = read_limit(filters, MAX_ROWS if form == "csv" else DEFAULT_ROWS, MAX_ROWS)
        try:
            page = await self._ledger.usage(first, last, limit=limit, after=filters.get("after"), **chosen)
        except ValueError:
            raise InvalidRequest("`after` must be the `last_id` of the previous page.", param="after") from None
        last_id = row_id(page.rows[-1]) if page.rows else None
        if form == "csv":
            if page.has_more and "limit" not in filters:  # a truncated file would look complete
                why = f"There are more than {MAX_ROWS} rows: ask for fewer days, or for pages with `limit` and `after`."
                raise InvalidRequest(why, param="limit")
            headers = PRIVATE | {"content-disposition": 'attachment; filename="usage.csv"'}
            headers |= {"x-has-more": str(page.has_more).lower()} | ({"x-last-id": last_id} if last_id else {})
            csv = await asyncio.to_thread(as_csv, page.rows)
            return await response.send(csv.encode(), headers, "text/csv; charset=utf-8")
        report = about | {"from": first.isoformat(), "to": last.isoformat(), "total": page.total, "rows": page.rows}
        return await response.send(orjson.dumps(report | {"has_more": page.has_more, "last_id": last_id}), PRIVATE)


def _range(filters: Mapping[str, str]) -> tuple[date, date]:
    days = {}
    for name in ("from", "to"):
        try:
            days[name] = date.fromisoformat(filters[name]) if name in filters else None
        except ValueError:
            raise InvalidRequest(f"`{name}` must be a day such as 2026-11-23.", param=name) from None
    last = days["to"] or datetime.now(UTC).date()
    try:
        first = days["from"] or last - timedelta(days=DEFAULT_DAYS - 1)
    except OverflowError:
        raise InvalidRequest(f"`to` is too early: `from` defaults to {DEFAULT_DAYS} days before.", param="to") from None
    if not timedelta(0) <= last - first < timedelta(days=MAX_DAYS):
        raise InvalidRequest(f"`from` to `to` must span 1 to {MAX_DAYS} days.", param="from")
    return first, last


def _budget(limit: int | None, spent: int) -> dict[str, float | None]:
    left = None if limit is None else float(money.to_usd(max(0, limit - spent)))
    return {
        "limit": None if limit is None else float(money.to_usd(limit)),
        "spent": float(money.to_usd(spent)),
        "left": left,
    }
