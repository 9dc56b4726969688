"""Files at /v1/files, uploaded for batches or made by them: OpenAI's shapes, on a disk.

Each owner has a folder of its own, named by a hash: another owner's id is not found. A file is there from the moment
its description is, which is written last. Knows nothing of what is in a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import parse_qs

import orjson
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ..errors import (
    BodyTimeout,
    BodyTooLarge,
    ClientDisconnected,
    InvalidRequest,
    StorageFull,
    UnsupportedMediaType,
    UploadNotFound,
)
from ..keys.authentication import Identity

log = logging.getLogger("lab_proxy.files")

DAY = 86_400
KEPT_SECONDS = 30 * DAY  # OpenAI's default for files of batches, and its longest
SHORTEST_SECONDS = 3600
MOST_FILES = 2_000  # of one owner
MOST_LISTED = 10_000
FORM_BYTES = 65_536  # of a form around its file
MOST_PARTS = 16
PIECE = 262_144

_ID = re.compile(r"file-[0-9a-f]{32}")


class Visit(Protocol):
    """app.Visit: one request to a page."""

    path: str
    query: bytes
    headers: Any  # has .get(name, default)
    identity: Identity
    receive: Callable[[], Awaitable[dict[str, Any]]]


class Out(Protocol):
    async def send(
        self, body: bytes, headers: Mapping[str, str], content_type: str = ..., status: int = ...
    ) -> None: ...

    async def send_chunks(self, headers: Mapping[str, str], content_type: str, parts: AsyncIterator[bytes]) -> None: ...


Page = Callable[[Any, Any], Awaitable[None]]


class FileStore:
    """The folder. Its methods wait for the disk: call the slow ones in a thread."""

    def __init__(self, folder: Path, *, max_bytes: int, max_total_bytes: int) -> None:
        """`max_bytes`: of one upload; `max_total_bytes`: of all files of one owner."""
        self.root = folder
        self.max_bytes = max_bytes
        self.max_total_bytes = max_total_bytes

    def home(self, owner: str) -> Path:
        """The owner's folder, there or not."""
        return self.root / hashlib.sha256(owner.encode()).hexdigest()[:32]

    def content(self, home: Path, file_id: str) -> Path:
        return home / f"{file_id}.jsonl"

    def draft(self, home: Path) -> tuple[BinaryIO, Path]:
        """An open file of no name yet, for its owner alone, on the same disk as what it will become."""
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".draft-", dir=home)
        return os.fdopen(descriptor, "wb"), Path(name)

    def add(
        self, home: Path, draft: Path, *, filename: str, purpose: str, kept: int = KEPT_SECONDS, name: str = ""
    ) -> dict[str, Any]:
        """Turn a draft into a file; its object. `name`: the id, where it was chosen before."""
        file_id = name or f"file-{secrets.token_hex(16)}"
        now = int(time.time())
        made = {"id": file_id, "object": "file", "bytes": draft.stat().st_size, "created_at": now,
                "expires_at": now + kept, "filename": filename, "purpose": purpose, "status": "processed",
                "status_details": None}  # fmt: skip
        draft.replace(self.content(home, file_id))
        write(home / f"{file_id}.json", orjson.dumps(made))
        return made

    def find(self, home: Path, file_id: str) -> dict[str, Any]:
        """Raises NoSuchFile, also for what is another owner's."""
        if _ID.fullmatch(file_id):
            with contextlib.suppress(OSError, orjson.JSONDecodeError):
                found: dict[str, Any] = orjson.loads((home / f"{file_id}.json").read_bytes())
                if found["expires_at"] > time.time():
                    return found
        raise UploadNotFound(f"There is no file {file_id[:80]} here.", param="file_id")

    def listed(self, home: Path) -> list[dict[str, Any]]:
        """The oldest first."""
        found = []
        for path in home.glob("file-*.json"):
            with contextlib.suppress(UploadNotFound):
                found.append(self.find(home, path.stem))
        return sorted(found, key=lambda each: (each["created_at"], each["id"]))

    def remove(self, home: Path, file_id: str) -> None:
        self.find(home, file_id)
        (home / f"{file_id}.json").unlink(missing_ok=True)
        self.content(home, file_id).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what has expired, and drafts that a killed process left."""
        for path in self.root.glob("*/file-*.json"):
            try:
                self.find(path.parent, path.stem)
            except UploadNotFound:
                path.unlink(missing_ok=True)
                self.content(path.parent, path.stem).unlink(missing_ok=True)
        for path in self.root.glob("*/.draft-*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - DAY:
                    path.unlink()

    def room(self, home: Path, size: int) -> None:
        """Raises StorageFull where the owner has no room for a file of so many bytes."""
        files = self.listed(home)
        if len(files) >= MOST_FILES or sum(each["bytes"] for each in files) + size > self.max_total_bytes:
            raise StorageFull(
                f"Your files are full: at most {MOST_FILES} of {self.max_total_bytes} bytes together "
                "(PROXY_FILES_TOTAL_BYTES). Delete some."
            )


def write(path: Path, data: bytes) -> None:
    """Write whole or not at all: a reader, and a start after a crash, see the old or the new content."""
    draft = path.with_name(f".draft-{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as out:
            out.write(data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def on_disk() -> Iterator[None]:
    """What a disk refuses, as this package's error."""
    try:
        yield
    except OSError as error:
        log.warning("files cannot be written: %s", error.strerror)
        raise StorageFull(
            "The disk takes no more files: the operator's log says why (PROXY_FILES_DIR).", status=507
        ) from None


# ---- pages


class FilePages:
    """The routes of /v1/files."""

    def __init__(self, files: FileStore, *, silence: float, total: float) -> None:
        """`silence`: seconds an upload may pause; `total`: seconds it may take."""
        self._files = files
        self._silence, self._total = silence, total

    def pages(self) -> dict[tuple[str, str], Page]:
        return {("POST", "/v1/files"): self.create, ("GET", "/v1/files"): self.list}

    def folders(self) -> dict[tuple[str, str], Page]:
        return {("GET", "/v1/files/"): self.get, ("DELETE", "/v1/files/"): self.delete}

    async def create(self, visit: Visit, out: Out) -> None:
        with on_disk():
            made = await self._made(visit)
        await out.send(orjson.dumps(made), {})

    async def _made(self, visit: Visit) -> dict[str, Any]:
        home = self._files.home(visit.identity.owner)
        await asyncio.to_thread(self._files.room, home, 0)
        draft, path = self._files.draft(home)
        try:
            with draft:
                form = UploadForm(visit.headers.get("content-type", ""), draft, self._files.max_bytes)
                await self._take(visit, form)
            if form.filename is None:
                raise InvalidRequest("The form has no `file`.", param="file")
            purpose = form.fields.get("purpose")
            if purpose != "batch":
                raise InvalidRequest("Only files of `purpose: batch` are of use here.", param="purpose")
            kept = lifetime(_nested(form.fields, "expires_after"), "expires_after")
            await asyncio.to_thread(self._files.room, home, form.size)
            return self._files.add(home, path, filename=form.filename, purpose=purpose, kept=kept)
        finally:
            path.unlink(missing_ok=True)

    async def list(self, visit: Visit, out: Out) -> None:
        asked = query(visit.query, {"after", "limit", "order", "purpose"})
        order = asked.get("order", "desc")
        if order not in {"asc", "desc"}:
            raise InvalidRequest("`order` is asc or desc.", param="order")
        found = await asyncio.to_thread(self._files.listed, self._files.home(visit.identity.owner))
        if "purpose" in asked:
            found = [each for each in found if each["purpose"] == asked["purpose"]]
        await out.send(page(found if order == "asc" else found[::-1], asked, MOST_LISTED, MOST_LISTED), {})

    async def get(self, visit: Visit, out: Out) -> None:
        file_id, _, rest = visit.path.removeprefix("/v1/files/").partition("/")
        home = self._files.home(visit.identity.owner)
        found = self._files.find(home, file_id if rest in {"", "content"} else "")
        if not rest:
            return await out.send(orjson.dumps(found), {})
        try:
            content = self._files.content(home, file_id).open("rb")
        except OSError:
            raise UploadNotFound(f"There is no file {file_id} here.", param="file_id") from None
        with content:
            headers = {"content-length": str(os.fstat(content.fileno()).st_size)}
            return await out.send_chunks(headers, "application/octet-stream", _pieces(content))

    async def delete(self, visit: Visit, out: Out) -> None:
        file_id = visit.path.removeprefix("/v1/files/")
        self._files.remove(self._files.home(visit.identity.owner), file_id)
        await out.send(orjson.dumps({"id": file_id, "object": "file", "deleted": True}), {})

    async def _take(self, visit: Visit, form: UploadForm) -> None:
        """The request's body into the form, as it comes."""
        length = visit.headers.get("content-length", "0")
        most = self._files.max_bytes + FORM_BYTES
        refusal = BodyTooLarge(f"The file is larger than {self._files.max_bytes} bytes (PROXY_FILES_MAX_BYTES).")
        if not length.isdigit() or int(length[:20]) > most:
            raise refusal
        size, more = 0, True
        try:
            async with asyncio.timeout(self._total):
                while more:
                    async with asyncio.timeout(self._silence):
                        message = await visit.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnected("The caller left before the file was whole.")
                    data = message.get("body", b"")
                    size += len(data)
                    if size > most:
                        raise refusal
                    form.feed(data)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise BodyTimeout("The file did not come in time (PROXY_BODY_TIMEOUT_SECONDS).") from None
        form.end()


async def _pieces(content: BinaryIO) -> AsyncIterator[bytes]:
    while piece := await asyncio.to_thread(content.read, PIECE):
        yield piece


class UploadForm:
    """A multipart form with one file, which goes to `draft`, and a few short fields. Bounded on every side."""

    def __init__(self, content_type: str, draft: BinaryIO, max_bytes: int) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise UnsupportedMediaType(
                "A file is sent as multipart/form-data, and the header `content-type` must say so."
            )
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.size = 0
        self._draft, self._max_bytes = draft, max_bytes
        self._parts = 0
        self._header = [b"", b""]
        self._disposition = b""
        self._name = ""
        self._value = bytearray()
        self._is_file = self._whole = False
        try:
            self._parser = MultipartParser(boundary, {
                "on_part_begin": self._part_begin, "on_part_data": self._data, "on_part_end": self._part_end,
                "on_header_field": self._header_field, "on_header_value": self._header_value,
                "on_header_end": self._header_end, "on_headers_finished": self._headers_finished, "on_end": self._end,
            })  # fmt: skip
        except FormParserError:
            raise _no_form() from None

    def feed(self, data: bytes) -> None:
        """Raises InvalidRequest for what is no form."""
        try:
            self._parser.write(data)
        except FormParserError:
            raise _no_form() from None

    def end(self) -> None:
        if not self._whole:
            raise _no_form()

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise InvalidRequest(f"The form has more than {MOST_PARTS} parts.")
        self._disposition, self._value, self._is_file = b"", bytearray(), False

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0] += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1] += data[start:end]

    def _header_end(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = self._header[1]
        self._header = [b"", b""]

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        if self._name == "file":
            if self.filename is not None:
                raise InvalidRequest("The form has more than one `file`.", param="file")
            self._is_file = True
            self.filename = (filename or b"upload").decode("utf-8", "replace")[:255]
        elif filename is not None or not self._name:
            raise InvalidRequest("The form's file is called `file`; its other parts are fields.", param="file")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.size += end - start
            if self.size > self._max_bytes:
                raise BodyTooLarge(f"The file is larger than {self._max_bytes} bytes (PROXY_FILES_MAX_BYTES).")
            self._draft.write(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > FORM_BYTES:
            raise InvalidRequest(f"`{self._name[:60]}` is too long.", param=self._name[:60])

    def _part_end(self) -> None:
        if not self._is_file:
            self.fields[self._name] = self._value.decode("utf-8", "replace")

    def _end(self) -> None:
        self._whole = True


def _no_form() -> InvalidRequest:
    return InvalidRequest("The body is not a whole multipart form.")


def _nested(fields: Mapping[str, str], name: str) -> dict[str, Any] | None:
    """`name[inner]` fields of a form as an object. Fields of other names are refused."""
    found: dict[str, Any] = {}
    for field, value in fields.items():
        if field == "purpose":
            continue
        if not field.startswith(f"{name}["):
            raise InvalidRequest(f"`{field[:60]}` is not known here.", param=field[:60])
        found[field[len(name) + 1 : -1]] = (
            int(value) if value.isascii() and value.isdigit() and len(value) < 12 else value
        )
    return found or None


def lifetime(given: Any, name: str) -> int:
    """Seconds that `expires_after` asks for. Raises InvalidRequest."""
    if given is None:
        return KEPT_SECONDS
    seconds = given.get("seconds") if isinstance(given, dict) else None
    right = isinstance(given, dict) and set(given) == {"anchor", "seconds"} and given["anchor"] == "created_at"
    if not right or not isinstance(seconds, int) or isinstance(seconds, bool) or \
            not SHORTEST_SECONDS <= seconds <= KEPT_SECONDS:  # fmt: skip
        raise InvalidRequest(
            f"`{name}` is an object of `anchor: created_at` and `seconds` from {SHORTEST_SECONDS} to {KEPT_SECONDS}.",
            param=name,
        )
    return seconds


def query(raw: bytes, known: set[str]) -> dict[str, str]:
    """The fields of a query string. Raises InvalidRequest for those that are not known."""
    try:
        asked = {name: values[-1] for name, values in parse_qs(raw.decode("latin-1"), max_num_fields=50).items()}
    except ValueError:
        raise InvalidRequest("Too many fields in the query.") from None
    if unknown := set(asked) - known:
        name = min(unknown)[:60]
        raise InvalidRequest(f"`{name}` is not known here.", param=name)
    return asked


def page(found: list[dict[str, Any]], asked: Mapping[str, str], default: int, most: int) -> bytes:
    """One page of a list, as the SDK's cursor wants it: `after` names the last object of the page before."""
    limit = asked.get("limit", str(default))
    if not (limit.isascii() and limit.isdigit() and len(limit) < 9 and 1 <= int(limit) <= most):
        raise InvalidRequest(f"`limit` is a number from 1 to {most}.", param="limit")
    after = asked.get("after")
    ids = [each["id"] for each in found]
    if after is not None:
        if after not in ids:
            raise InvalidRequest("`after` names nothing that is here.", param="after")
        found = found[ids.index(after) + 1 :]
    shown = found[: int(limit)]
    ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
    return orjson.dumps({"object": "list", "data": shown, **ends, "has_more": len(shown) < len(found)})
