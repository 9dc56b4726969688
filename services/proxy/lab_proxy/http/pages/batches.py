"""Batch pages at /v1/batches: create, list, get, cancel. Knows HTTP and the wire object; the worker runs batches."""

import asyncio
from collections.abc import Callable
from typing import Any

import orjson

from ...batches import batch
from ...batches.batch import FINAL, WINDOW, BatchFolder
from ...batches.files import FileStore, lifetime, on_disk
from ...endpoints import BATCHABLE
from ...errors import InvalidRequest, LimitReached
from ..guards import read_json, read_query
from ..response import PageRequest, Pages, Response, list_page

PATH = "/v1/batches"
MAX_OPEN = 50  # batches of one owner that are not final
_FIELDS = frozenset({"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"})


class BatchPages:
    def __init__(self, files: FileStore, wake: Callable[[], None]) -> None:
        """`wake` tells the worker that a batch was created or cancelled."""
        self._files, self._wake = files, wake

    def pages(self) -> Pages:
        return {
            ("POST", PATH): self._create,
            ("GET", PATH): self._list,
            ("GET", PATH + "/{id}"): self._get,
            ("POST", PATH + "/{id}/cancel"): self._cancel,
        }

    async def _create(self, request: PageRequest, response: Response) -> None:
        fields = await read_json(request)
        # 1. The fields.
        if unknown := set(fields) - _FIELDS:
            name = min(unknown)[:60]
            raise InvalidRequest(f"Unknown field `{name}`.", param=name)
        if fields.get("endpoint") not in BATCHABLE:
            raise InvalidRequest(f"`endpoint` must be one of {', '.join(BATCHABLE)}.", param="endpoint")
        if fields.get("completion_window") != WINDOW:
            raise InvalidRequest(f"`completion_window` must be {WINDOW}.", param="completion_window")
        metadata = fields.get("metadata")
        if metadata is not None and not _is_metadata(metadata):
            raise InvalidRequest("`metadata` must be an object of at most 16 short texts.", param="metadata")
        kept = lifetime(fields.get("output_expires_after"), "output_expires_after")
        # 2. The input file, and the owner's open batches.
        who, file_id = request.identity, fields.get("input_file_id")
        home = self._files.home(who.owner)
        file_id = file_id if isinstance(file_id, str) else ""
        self._files.find(home, file_id)
        if len(await asyncio.to_thread(lambda: list(home.glob("batch_*.input")))) >= MAX_OPEN:
            raise LimitReached(f"You have {MAX_OPEN} unfinished batches, the limit.", "requests", {"retry-after": "60"})
        # 3. The batch.
        given = {"endpoint": fields["endpoint"], "file_id": file_id, "metadata": metadata, "kept": kept}
        with on_disk():
            made = await asyncio.to_thread(batch.create, self._files, who.owner, who.key_id, **given)
        self._wake()
        await response.send(orjson.dumps(made), {})

    async def _list(self, request: PageRequest, response: Response) -> None:
        home = self._files.home(request.identity.owner)
        found = await asyncio.to_thread(batch.list_batches, home)
        await response.send(list_page(found, read_query(request, {"after", "limit"}), 20, 100), {})

    async def _get(self, request: PageRequest, response: Response) -> None:
        folder = self._folder(request, request.path.removeprefix(PATH + "/"))
        await response.send(orjson.dumps(folder.public()), {})

    async def _cancel(self, request: PageRequest, response: Response) -> None:
        batch_id, _, verb = request.path.removeprefix(PATH + "/").partition("/")
        folder = self._folder(request, batch_id if verb == "cancel" else "")
        status = folder.public()["status"]
        if status in FINAL - {"cancelled"}:
            raise InvalidRequest(f"The batch is {status} and cannot be cancelled.", status=409)
        if status != "cancelled":
            folder.cancel.touch(mode=0o600)
            self._wake()
        await response.send(orjson.dumps(folder.public()), {})

    def _folder(self, request: PageRequest, batch_id: str) -> BatchFolder:
        return BatchFolder(self._files.home(request.identity.owner), batch_id)


def _is_metadata(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= 16
        and all(len(name) <= 64 and isinstance(text, str) and len(text) <= 512 for name, text in value.items())
    )
