"""File pages at /v1/files: upload, list, download, delete. Knows HTTP and forms; batches.files stores the content."""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any, BinaryIO

import orjson

from ...batches.files import FileStore, lifetime, on_disk
from ...errors import BodyTimeout, FilesDisabled, InvalidRequest, UploadNotFound
from ...settings import Settings
from ..guards import read_query, receive_body
from ..multipart import FORM_BYTES, UploadForm
from ..response import Message, PageRequest, Pages, Response, list_page

PATH = "/v1/files"
MAX_LISTED = 10_000
CHUNK_BYTES = 262_144


class FilePages:
    def __init__(self, files: FileStore, settings: Settings) -> None:
        self._files = files
        self._idle, self._total = settings.body_timeout_seconds, settings.total_timeout_seconds

    def pages(self) -> Pages:
        return {
            ("POST", PATH): self._create,
            ("GET", PATH): self._list,
            ("GET", PATH + "/{id}"): self._get,
            ("GET", PATH + "/{id}/content"): self._get,
            ("DELETE", PATH + "/{id}"): self._delete,
        }

    async def _create(self, request: PageRequest, response: Response) -> None:
        home = self._files.home(request.identity.owner)
        with on_disk():
            await asyncio.to_thread(self._files.room, home, 0)
            draft, path = self._files.draft(home)
            try:
                with draft:
                    form = UploadForm(request.headers.get("content-type", ""), draft, self._files.max_bytes)
                    await self._read_form(request, form)
                if form.filename is None:
                    raise InvalidRequest("The form has no `file`.", param="file")
                if form.fields.get("purpose") != "batch":
                    raise InvalidRequest("`purpose` must be batch.", param="purpose")
                kept = lifetime(_nested(form.fields, "expires_after"), "expires_after")
                await asyncio.to_thread(self._files.room, home, form.size)
                made = self._files.add(home, path, filename=form.filename, purpose="batch", kept=kept)
            finally:
                path.unlink(missing_ok=True)
        await response.send(orjson.dumps(made), {})

    async def _read_form(self, request: PageRequest, form: UploadForm) -> None:
        async def receive() -> Message:
            async with asyncio.timeout(self._idle):
                return await request.receive()

        most = self._files.max_bytes
        why = f"The file is larger than {most} bytes (PROXY_FILES_MAX_BYTES)."
        try:
            async with asyncio.timeout(self._total):
                await receive_body(request.headers, receive, most + FORM_BYTES, why, form.feed)
        except TimeoutError:
            raise BodyTimeout("The file did not arrive in time (PROXY_BODY_TIMEOUT_SECONDS).") from None
        form.end()

    async def _list(self, request: PageRequest, response: Response) -> None:
        query = read_query(request, {"after", "limit", "order", "purpose"})
        order = query.get("order", "desc")
        if order not in {"asc", "desc"}:
            raise InvalidRequest("`order` must be asc or desc.", param="order")
        found = await asyncio.to_thread(self._files.listed, self._files.home(request.identity.owner))
        if "purpose" in query:
            found = [each for each in found if each["purpose"] == query["purpose"]]
        page = list_page(found if order == "asc" else found[::-1], query, MAX_LISTED, MAX_LISTED)
        await response.send(page, {})

    async def _get(self, request: PageRequest, response: Response) -> None:
        file_id, _, rest = request.path.removeprefix(PATH + "/").partition("/")
        home = self._files.home(request.identity.owner)
        found = self._files.find(home, file_id if rest in {"", "content"} else "")
        if not rest:
            return await response.send(orjson.dumps(found), {})
        try:
            content = self._files.content(home, file_id).open("rb")
        except OSError:
            raise UploadNotFound(f"File {file_id} does not exist.", param="file_id") from None
        with content:
            headers = {"content-length": str(os.fstat(content.fileno()).st_size)}
            return await response.send_chunks(headers, "application/octet-stream", _chunks(content))

    async def _delete(self, request: PageRequest, response: Response) -> None:
        file_id = request.path.removeprefix(PATH + "/")
        self._files.remove(self._files.home(request.identity.owner), file_id)
        await response.send(orjson.dumps({"id": file_id, "object": "file", "deleted": True}), {})


async def _chunks(content: BinaryIO) -> AsyncIterator[bytes]:
    while chunk := await asyncio.to_thread(content.read, CHUNK_BYTES):
        yield chunk


async def files_disabled(_: PageRequest, __: Response) -> None:
    """Replaces the pages of files and batches. Raises FilesDisabled."""
    raise FilesDisabled("Files and batches are switched off (PROXY_FILES_ENABLED).")


def _nested(fields: Mapping[str, str], name: str) -> dict[str, Any] | None:
    """The form's fields `name[inner]` as an object. Fields of other names are refused."""
    found: dict[str, Any] = {}
    for field, value in fields.items():
        if field == "purpose":
            continue
        if not field.startswith(f"{name}["):
            raise InvalidRequest(f"Unknown field `{field[:60]}`.", param=field[:60])
        number = value.isascii() and value.isdigit() and len(value) < 12
        found[field[len(name) + 1 : -1]] = int(value) if number else value
    return found or None
