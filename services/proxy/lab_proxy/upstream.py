"""The HTTP client: one upstream's answers, whole or in pieces, with a bound on every wait; and the model service's ids.

Turns every fault of network and upstream into the errors of this package. Knows nothing of the cache or the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import quote

import aiohttp
import orjson
from yarl import URL

from . import __version__
from .errors import ProxyError, UpstreamBroken, UpstreamDown, UpstreamLimited, UpstreamRefused, UpstreamTimeout
from .routes import Access
from .settings import Settings

log = logging.getLogger("lab_proxy.upstream")

MAX_ANSWER_BYTES = 256 * 1024 * 1024
KEEPALIVE_SECONDS = 4.0  # below the 5 s after which uvicorn and others close: a reused connection is not a closed one
_PASSED = "x-ratelimit-"
_PASSED_NAMES = frozenset({
    "retry-after", "x-model-revision", "x-should-retry", "openai-processing-ms", "openai-version",
})  # fmt: skip


class Reply:
    """A 2xx answer whose body has not been read."""

    def __init__(self, response: aiohttp.ClientResponse, name: str, settings: Settings, redact: bytes) -> None:
        self._response = response
        self._name = name
        self._settings = settings
        self._redact = redact
        self.headers = passed_on(response.headers)
        self.revision = response.headers.get("x-model-revision")
        self.streams = response.content_type == "text/event-stream"

    async def json(self) -> tuple[bytes, Any]:
        """The body, as it came and parsed. Raises UpstreamBroken when it is not JSON."""
        with _faults(self._name):
            raw = await _whole(self._response)
        try:
            return raw, orjson.loads(raw)
        except orjson.JSONDecodeError:
            raise UpstreamBroken(
                f"The upstream `{self._name}` answered {self._response.status} with {self._response.content_type} "
                "instead of JSON: check its base URL."
            ) from None

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises UpstreamTimeout after too long a silence, UpstreamBroken for a broken end."""
        limit = self._settings.first_byte_timeout_seconds
        while True:
            with _faults(self._name):
                async with asyncio.timeout(limit):
                    piece = await self._response.content.readany()
            if not piece:
                return
            yield piece
            limit = self._settings.idle_timeout_seconds

    async def drain(self) -> None:
        """Read to the end, which is near: the connection can then be used again."""
        with contextlib.suppress(ProxyError, TimeoutError):
            async with asyncio.timeout(1):
                async for _ in self.pieces():
                    pass

    def redacted(self, data: bytes) -> bytes:
        """`data` without the upstream's key, should an error message repeat it."""
        return data.replace(self._redact, b"[redacted]") if self._redact else data


class Upstream:
    """One OpenAI-compatible API. Start it before use; its connections are kept and reused."""

    def __init__(self, access: Access, settings: Settings) -> None:
        self.access = access
        self._settings = settings
        self._session: aiohttp.ClientSession  # from start on: it belongs to the running event loop
        self._key = (access.key or "").encode()

    async def start(self) -> None:
        headers = {"user-agent": f"llm-lab-proxy/{__version__}", "accept-encoding": "identity"}
        if self.access.key:
            headers["authorization"] = f"Bearer {self.access.key}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._settings.connect_timeout_seconds),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def stop(self) -> None:
        await self._session.close()

    @contextlib.asynccontextmanager
    async def post(self, endpoint: str, model: str, body: bytes, request_id: str, stream: bool) -> AsyncIterator[Reply]:
        """Ask. Leaving the block early closes the connection, which is how an upstream learns to stop.

        Raises UpstreamDown, UpstreamTimeout, UpstreamBroken, UpstreamLimited, or UpstreamRefused with its own envelope.
        """
        base = self.access.base_url
        url = f"{base}/m/{quote(model, safe='')}{endpoint}" if self.access.kind == "model" else base + endpoint[3:]
        headers = {
            "content-type": "application/json",
            "accept": "text/event-stream" if stream else "application/json",
            "x-request-id": request_id,
        }
        settings = self._settings
        limit = settings.first_byte_timeout_seconds if stream else settings.total_timeout_seconds
        with _faults(self.access.name):
            async with asyncio.timeout(limit):
                response = await self._session.post(
                    URL(url, encoded=True), data=body, headers=headers, allow_redirects=False
                )
        try:
            if response.status >= 300:
                with _faults(self.access.name):
                    async with asyncio.timeout(settings.idle_timeout_seconds):
                        raise self._refusal(response, await _whole(response))
            reply = Reply(response, self.access.name, settings, self._key)
            if reply.headers.get("x-upstream-request-id") == request_id:
                del reply.headers["x-upstream-request-id"]
            yield reply
        finally:
            response.close()

    async def get(self, path: str, limit: float) -> tuple[int, Any]:
        """Status and parsed body of a GET at the upstream's root. Raises like post."""
        with _faults(self.access.name):
            async with asyncio.timeout(limit), self._session.get(self.access.base_url + path) as response:
                raw = await _whole(response)
        try:
            return response.status, orjson.loads(raw)
        except orjson.JSONDecodeError:
            raise UpstreamBroken(f"`{self.access.name}` answers {path} with something that is not JSON.") from None

    def _refusal(self, response: aiohttp.ClientResponse, raw: bytes) -> ProxyError:
        name, status = self.access.name, response.status
        headers = passed_on(response.headers)
        if status == 401:
            return UpstreamBroken(
                f"The upstream `{name}` does not accept the proxy's key: check PROXY_OPENAI_API_KEY "
                "or the key file in the routes file.",
                code="upstream_key_refused",
            )
        with contextlib.suppress(orjson.JSONDecodeError):
            said = orjson.loads(raw)
            if status >= 400 and isinstance(said, dict) and isinstance(said.get("error"), dict):
                return UpstreamRefused(status, raw.replace(self._key, b"[redacted]") if self._key else raw, headers)
        if status == 429:
            return UpstreamLimited(f"The upstream `{name}` takes no more requests for now.", headers=headers)
        return UpstreamBroken(
            f"The upstream `{name}` answered {status} with something that is not OpenAI's error: check its base URL."
        )


class LocalModels:
    """The model service's entries by id, read in the background: a redeploy is known within the poll's interval."""

    def __init__(self, upstream: Upstream, interval: float) -> None:
        self._upstream = upstream
        self._interval = interval
        self._task: asyncio.Task[None] | None = None
        self.entries: dict[str, dict[str, Any]] = {}

    async def start(self) -> None:
        await self._read()
        self._task = asyncio.get_running_loop().create_task(self._watch(), name="local-models")

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def learn(self, model: str, revision: str | None) -> None:
        """An answer carried this revision: the next request is keyed on it."""
        entry = self.entries.get(model)
        if entry is not None and revision and entry.get("revision") != revision:
            self.entries[model] = {**entry, "revision": revision}

    async def ready(self) -> dict[str, Any]:
        """`state` (up, loading, down) with the service's own report, or with what to do."""
        try:
            status, said = await self._upstream.get("/ready", 2.0)
        except ProxyError as error:
            return {"state": "down", "detail": error.message}
        if not isinstance(said, dict):
            return {"state": "down", "detail": f"/ready answered {status} with something unknown"}
        state = "up" if status == 200 else "loading" if said.get("status") == "loading" else "down"
        if any(each["state"] == "ready" and each["id"] not in self.entries for each in said.get("models", ())):
            await self._read()  # whoever hears that it is up may ask at once
        return {"state": state, **said}

    async def look_again(self, model: str) -> None:
        """Read the ids now. Raises UpstreamDown where the service has `model` but does not serve it yet."""
        await self._read()
        if model in self.entries:
            return
        for each in (await self.ready()).get("models", ()):
            if each.get("id") == model and each.get("state") != "ready":
                raise UpstreamDown(
                    f"`{model}` is {each.get('state')}: /status tells when it is up, `make logs` why it is not.",
                    param="model",
                    headers={"retry-after": "2"},
                )

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._interval if self.entries else min(0.3, self._interval))
            await self._read()

    async def _read(self) -> None:
        try:
            status, said = await self._upstream.get("/v1/models", 1.0)
            if status == 200:
                self.entries = {entry["id"]: entry for entry in said["data"]}
        except (ProxyError, KeyError, TypeError) as error:
            log.debug("the model service's ids are not to be had: %s", error)


def passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    """The few headers of an upstream that concern the caller: no cookie, no hop-by-hop header, no owner of the key."""
    kept = {}
    for name, value in headers.items():
        lower = name.lower()
        if lower in _PASSED_NAMES or lower.startswith(_PASSED):
            kept[lower] = value
    if "x-request-id" in headers:
        kept["x-upstream-request-id"] = headers["x-request-id"]
    return kept


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    pieces, size = [], 0
    while piece := await response.content.readany():
        size += len(piece)
        if size > MAX_ANSWER_BYTES:
            raise aiohttp.ClientPayloadError("too large")
        pieces.append(piece)
    return b"".join(pieces)


@contextlib.contextmanager
def _faults(name: str) -> Any:
    """Network faults as this package's errors, with what to do."""
    where = "PROXY_MODEL_URL, `make logs`" if name == "model" else "its base URL and the network"
    try:
        yield
    except aiohttp.ConnectionTimeoutError:
        raise UpstreamTimeout(f"The upstream `{name}` took no connection in time: check {where}.") from None
    except (TimeoutError, aiohttp.ServerTimeoutError):
        raise UpstreamTimeout(
            f"The upstream `{name}` was silent for too long: ask for less, or raise PROXY_*_TIMEOUT_SECONDS."
        ) from None
    except aiohttp.ClientConnectorError:
        raise UpstreamDown(
            f"The upstream `{name}` cannot be reached: check {where}; `make start` starts the lab.",
            headers={"retry-after": "2"},
        ) from None
    except (aiohttp.ClientError, OSError):
        raise UpstreamBroken(f"The upstream `{name}` broke its answer off: check {where}.") from None
