"""The operator's pages of virtual keys at /admin/keys. Knows HTTP; keys.store does the work."""

import asyncio
import logging
import re

import orjson

from ...errors import InvalidRequest, MethodNotAllowed, PathNotFound
from ...keys.store import KeyStore, key_spec
from ...ledger import money
from ...ledger.ledger import Ledger
from ..guards import read_json, read_query
from ..response import PRIVATE, PageRequest, Pages, Response, list_page

log = logging.getLogger("lab_proxy.admin")

PATH = "/admin/keys"
DEFAULT_LISTED, MAX_LISTED = 100, 1000


class KeyPages:
    def __init__(self, store: KeyStore, ledger: Ledger) -> None:
        self._store, self._ledger = store, ledger

    def pages(self) -> Pages:
        return {
            ("GET", PATH): self._list,
            ("POST", PATH): self._create,
            ("GET", PATH + "/{id}"): self._get,
            ("PATCH", PATH + "/{id}"): self._change,
            ("DELETE", PATH + "/{id}"): self._revoke,
            ("POST", PATH + "/{id}/rotate"): self._rotate,
        }

    async def _create(self, request: PageRequest, response: Response) -> None:
        ((key, secret),) = await self._store.create([key_spec(await read_json(request))])
        log.info("key %s created for %s", key.id, key.owner)
        await response.send(orjson.dumps(key.public_fields() | {"key": secret}), PRIVATE, status=201)

    async def _list(self, request: PageRequest, response: Response) -> None:
        query = read_query(request, {"owner", "state", "after", "limit"})
        filters = {name: value for name, value in query.items() if name in {"owner", "state"}}
        keys = await self._store.list()

        def page() -> bytes:
            shown = [key.public_fields() for key in keys]
            found = [key for key in shown if all(key[name] == value for name, value in filters.items())]
            return list_page(found, query, DEFAULT_LISTED, MAX_LISTED)

        await response.send(await asyncio.to_thread(page), PRIVATE)

    async def _get(self, request: PageRequest, response: Response) -> None:
        key = await self._store.get(_key_id(request))
        day, total = await self._ledger.spent(key.id)
        spent = {"spent_today_usd": float(money.to_usd(day)), "spent_total_usd": float(money.to_usd(total))}
        await response.send(orjson.dumps(key.public_fields() | spent), PRIVATE)

    async def _change(self, request: PageRequest, response: Response) -> None:
        key = await self._store.change(_key_id(request), await read_json(request))
        log.info("key %s changed", key.id)
        await response.send(orjson.dumps(key.public_fields()), PRIVATE)

    async def _revoke(self, request: PageRequest, response: Response) -> None:
        key = await self._store.revoke(_key_id(request))
        log.info("key %s revoked", key.id)
        await response.send(orjson.dumps(key.public_fields()), PRIVATE)

    async def _rotate(self, request: PageRequest, response: Response) -> None:
        key_id = _key_id(request, "/rotate")
        fields = await read_json(request) if request.headers.get("content-length", "0") != "0" else {}
        grace = fields.pop("grace_seconds", 0)
        if fields or isinstance(grace, bool) or not isinstance(grace, int | float):
            raise InvalidRequest("The only field is `grace_seconds`, a number.", param="grace_seconds")
        key, secret = await self._store.rotate(key_id, grace)
        log.info("key %s rotated", key.id)
        await response.send(orjson.dumps(key.public_fields() | {"key": secret}), PRIVATE)


def _key_id(request: PageRequest, suffix: str = "") -> str:
    if not request.path.endswith(suffix):
        raise MethodNotAllowed(f"POST to {PATH} or {PATH}/<id>/rotate.", headers={"allow": "GET, PATCH, DELETE"})
    key_id = request.path.removeprefix(PATH + "/").removesuffix(suffix)
    if not re.fullmatch(r"key_[0-9a-f]{1,32}", key_id):
        raise PathNotFound(f"The path of a key is {PATH}/key_….")
    return key_id
