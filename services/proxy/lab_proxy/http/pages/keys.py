"""The operator's pages: virtual keys and everybody's usage, with the admin key; and a caller's own usage, with his.

No web page may call the operator's pages, whatever PROXY_ALLOWED_ORIGINS says. Knows HTTP; keyring and ledger do the
work.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qs

import orjson

from ... import canonical
from ...errors import (
    InvalidKey,
    InvalidRequest,
    KeysUnavailable,
    MethodNotAllowed,
    OriginNotAllowed,
    PathNotFound,
    UnsupportedMediaType,
)
from ...keys.store import KeyStore, key_spec
from ...ledger import ledger, money
from ...redis.link import FAULTS

if TYPE_CHECKING:
    from ..app import Page, PageRequest, Response

log = logging.getLogger("lab_proxy.admin")

KEYS = "/admin/keys"
_PRIVATE = {"cache-control": "no-store"}
_DAYS = 30  # that a page shows when nobody says which
_FILTERS = frozenset({"from", "to", "owner", "model", "key_id", "format"})


class Doorkeeper(Protocol):
    """keys.Keys as the pages see it."""

    def is_admin(self, headers: Mapping[str, str]) -> bool: ...


class KeyPages:
    """`pages` are for the application, which serves a path that ends in `/` with all below it."""

    def __init__(self, keys: Doorkeeper, ring: KeyStore, book: ledger.Ledger, *, enabled: bool) -> None:
        """`enabled`: there is an admin key."""
        self._keys, self._ring, self._book = keys, ring, book
        self._enabled = enabled

    def pages(self) -> dict[tuple[str, str], Page]:
        return {
            ("GET", "/usage"): _guarded(self._own),
            ("GET", "/admin/usage"): self._admitted(self._everybody),
            ("GET", KEYS): self._admitted(self._list),
            ("POST", KEYS): self._admitted(self._create),
            ("GET", KEYS + "/"): self._admitted(self._show),
            ("PATCH", KEYS + "/"): self._admitted(self._change),
            ("DELETE", KEYS + "/"): self._admitted(self._revoke),
            ("POST", KEYS + "/"): self._admitted(self._rotate),
        }

    def _admitted(self, page: Page) -> Page:
        """`page`, for who shows the admin key and is no web page."""

        async def admitted(visit: PageRequest, out: Response) -> None:
            if "origin" in visit.headers:
                raise OriginNotAllowed("Web pages may not call the operator's pages.")
            if not self._enabled:
                raise PathNotFound("The operator's pages are off: set PROXY_ADMIN_KEY_FILE.")
            if not self._keys.is_admin(visit.headers):
                raise InvalidKey("The operator's pages want the admin key: `Authorization: Bearer …`.")
            await page(visit, out)

        return _guarded(admitted)

    # ---- keys

    async def _create(self, visit: PageRequest, out: Response) -> None:
        ((key, secret),) = await self._ring.create([key_spec(await _body(visit))])
        log.info("key %s created for %s", key.id, key.owner)
        await _answer(out, key.shown() | {"key": secret}, status=201)

    async def _list(self, visit: PageRequest, out: Response) -> None:
        asked = _query(visit, frozenset({"owner", "state"}))
        shown = [key.shown() for key in await self._ring.list()]
        found = [key for key in shown if all(key[name] == value for name, value in asked.items())]
        await _answer(out, {"object": "list", "data": found})

    async def _show(self, visit: PageRequest, out: Response) -> None:
        key = await self._ring.get(_key_id(visit))
        day, total = await self._book.spent(key.id)
        spent = {"spent_today_usd": float(money.to_usd(day)), "spent_total_usd": float(money.to_usd(total))}
        await _answer(out, key.shown() | spent)

    async def _change(self, visit: PageRequest, out: Response) -> None:
        key = await self._ring.change(_key_id(visit), await _body(visit))
        log.info("key %s changed", key.id)
        await _answer(out, key.shown())

    async def _revoke(self, visit: PageRequest, out: Response) -> None:
        key = await self._ring.revoke(_key_id(visit))
        log.info("key %s revoked", key.id)
        await _answer(out, key.shown())

    async def _rotate(self, visit: PageRequest, out: Response) -> None:
        key_id = _key_id(visit, "/rotate")
        given = await _body(visit) if visit.headers.get("content-length", "0") != "0" else {}
        grace = given.pop("grace_seconds", 0)
        if given or isinstance(grace, bool) or not isinstance(grace, int | float):
            raise InvalidRequest("A rotation takes `grace_seconds`, a number, and nothing else.", param="grace_seconds")
        key, secret = await self._ring.rotate(key_id, grace)
        log.info("key %s rotated", key.id)
        await _answer(out, key.shown() | {"key": secret})

    # ---- usage

    async def _own(self, visit: PageRequest, out: Response) -> None:
        who = visit.identity
        asked = _query(visit, _FILTERS - {"owner", "key_id"})
        first, last = _range(asked)
        await self._book.flush()
        key_id = who.key_id or ledger.NOBODY
        rows = await self._book.usage(first, last, key_id=key_id, model=asked.get("model"))
        if _wants_csv(asked):
            return await _answer_csv(out, rows)
        day, total = await self._book.spent(key_id)
        limits = {name: getattr(who, name) for name in ("rpm", "tpm", "concurrency", "models")}
        budget = {"per_day": _budget(who.budget_day, day), "total": _budget(who.budget_total, total)}
        said = {"key_id": who.key_id, "owner": who.owner, "limits": limits, "budget_usd": budget}
        return await _answer(out, said | _report(first, last, rows))

    async def _everybody(self, visit: PageRequest, out: Response) -> None:
        asked = _query(visit, _FILTERS)
        first, last = _range(asked)
        await self._book.flush()
        rows = await self._book.usage(
            first, last, key_id=asked.get("key_id"), owner=asked.get("owner"), model=asked.get("model")
        )
        if _wants_csv(asked):
            return await _answer_csv(out, rows)
        return await _answer(out, _report(first, last, rows))


def _guarded(page: Page) -> Page:
    """`page`, with redis's faults as this package's errors."""

    async def guarded(visit: PageRequest, out: Response) -> None:
        try:
            await page(visit, out)
        except FAULTS:
            if out.started:
                raise
            raise KeysUnavailable(
                "Redis is down or refuses: keys and usage lie there.", headers={"retry-after": "2"}
            ) from None

    return guarded


def _key_id(visit: PageRequest, end: str = "") -> str:
    rest = visit.path.removeprefix(KEYS + "/")
    if end and not rest.endswith(end):
        raise MethodNotAllowed(f"POST goes to {KEYS} or {KEYS}/<id>/rotate.", headers={"allow": "GET, PATCH, DELETE"})
    key_id = rest.removesuffix(end) if end else rest
    if not re.fullmatch(r"key_[0-9a-f]{1,32}", key_id):
        raise PathNotFound(f"Keys lie at {KEYS}/key_….")
    return key_id


async def _body(visit: PageRequest) -> dict[str, Any]:
    if visit.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType("The body must be application/json, and the header `content-type` must say so.")
    return canonical.parse(await visit.read())


def _query(visit: PageRequest, known: frozenset[str]) -> dict[str, str]:
    """What the query says. Raises InvalidRequest for what the page does not know."""
    said = parse_qs(visit.query.decode("latin-1"), keep_blank_values=False, max_num_fields=50)
    for name in said:
        if name not in known:
            raise InvalidRequest(f"`{name[:60]}` is not known here: {', '.join(sorted(known))}.", param=name[:60])
    return {name: values[-1] for name, values in said.items()}


def _range(asked: Mapping[str, str]) -> tuple[date, date]:
    days = {}
    for name in ("from", "to"):
        try:
            days[name] = date.fromisoformat(asked[name]) if name in asked else None
        except ValueError:
            raise InvalidRequest(f"`{name}` is a day, as 2026-11-23.", param=name) from None
    last = days["to"] or datetime.now(UTC).date()
    first = days["from"] or last - timedelta(days=_DAYS - 1)
    if not timedelta(0) <= last - first < timedelta(days=ledger.MOST_DAYS):
        raise InvalidRequest(f"`from` to `to` are 1 to {ledger.MOST_DAYS} days.", param="from")
    return first, last


def _wants_csv(asked: Mapping[str, str]) -> bool:
    form = asked.get("format", "json")
    if form not in {"json", "csv"}:
        raise InvalidRequest("`format` is json or csv.", param="format")
    return form == "csv"


def _report(first: date, last: date, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"from": first.isoformat(), "to": last.isoformat(), "total": ledger.total(rows), "rows": rows}


def _budget(limit: int | None, spent: int) -> dict[str, float | None]:
    return {
        "limit": None if limit is None else float(money.to_usd(limit)),
        "spent": float(money.to_usd(spent)),
        "left": None if limit is None else float(money.to_usd(max(0, limit - spent))),
    }


async def _answer(out: Response, said: Any, status: int = 200) -> None:
    await out.send(orjson.dumps(said), _PRIVATE, status=status)


async def _answer_csv(out: Response, rows: list[dict[str, Any]]) -> None:
    headers = _PRIVATE | {"content-disposition": 'attachment; filename="usage.csv"'}
    await out.send(ledger.as_csv(rows).encode(), headers, "text/csv; charset=utf-8")
