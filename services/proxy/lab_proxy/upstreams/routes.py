"""Routes: the upstream of each model name, its fallbacks and cache rules, from one YAML file.

Knows names, patterns, aliases and tables of defaults. Makes no calls: the model list is passed in. A reload replaces
the whole table or nothing.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from ..canonical import encode
from ..endpoints import default_tables
from ..errors import ModelNotFound, UpstreamDown
from ..ledger import money
from ..reload import read_yaml
from ..settings import Settings, forward_proxy, is_http

OPENAI_URL = "https://api.openai.com/v1"
AUTO = "auto"
MAX_CACHED_NAMES = 1000  # cached targets: callers may invent any number of names

Listed = Mapping[str, Mapping[str, Any]]  # the model service's models by id


Count = Annotated[int, Field(ge=1, le=1_000_000_000, strict=True)]


class UpstreamRow(BaseModel, extra="forbid"):
    kind: Literal["model", "openai"]
    base_url: str | None = None
    api_key_file: Path | None = None
    keyless: bool = False
    native: bool = True
    openai_key: bool = False
    defaults: str | None = None
    stream_usage: bool = True
    responses: bool = False
    rpm: Count | None = None
    tpm: Count | None = None
    usd_per_day: Annotated[Decimal, BeforeValidator(money.parse_usd)] | None = None

    @field_validator("base_url")
    @classmethod
    def _http_url(cls, value: str | None) -> str | None:
        if value is not None and (not is_http(value) or "?" in value):
            raise ValueError("must be an http:// or https:// URL without a query")
        return value


class FallbackRow(BaseModel, extra="forbid"):
    upstream: str
    model: str


class RouteRow(BaseModel, extra="forbid"):
    upstream: str
    match: list[str] | None = None
    ttl_seconds: int | None = Field(None, ge=1)
    store_sampled: bool = False
    samples: int = Field(1, ge=1, le=100)
    stale_while_revalidate_seconds: int = Field(0, ge=0)
    stale_if_error_seconds: int = Field(0, ge=0)
    fallbacks: list[FallbackRow] = []


class AliasRow(BaseModel, extra="forbid"):
    name: str
    model: str
    unless: str | None = None


MAX_PARTS = 10_000  # of one content are read; each further one counts as one character


class AutoRow(BaseModel, extra="forbid"):
    """The models that `model: "auto"` chooses from. A threshold of None is ignored."""

    small: str
    large: str
    prompt_characters: int | None = Field(None, ge=1)
    messages: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    large_for: list[Literal["tools", "response_format", "images"]] = []

    def size(self, body: Mapping[str, Any]) -> str:
        """`small`, or `large` with the first reason that holds."""
        messages = body.get("messages")
        messages = messages if isinstance(messages, list) else []
        form = body.get("response_format")
        form = form.get("type", "text") if isinstance(form, dict) else "text"
        given = [each.get("content") for each in messages if isinstance(each, dict)]
        given += [body.get(name) for name in ("prompt", "input", "instructions")]
        characters, images = 0, False
        for content in given:
            parts = content if isinstance(content, list) else [content]
            characters += max(0, len(parts) - MAX_PARTS)
            for part in parts[:MAX_PARTS]:
                text = (part.get("text") or part.get("content")) if isinstance(part, dict) else part
                characters += len(text) if isinstance(text, str) else 0
                images = images or (isinstance(part, dict) and str(part.get("type", "text")).find("image") >= 0)
        limits = [body.get(name) for name in ("max_completion_tokens", "max_tokens", "max_output_tokens")]
        most = max((limit for limit in limits if isinstance(limit, int)), default=0)
        reasons = (
            ("tools", "tools" in self.large_for and bool(body.get("tools")) and body.get("tool_choice") != "none"),
            ("response_format", "response_format" in self.large_for and form != "text"),
            ("images", "images" in self.large_for and images),
            ("prompt", self.prompt_characters is not None and characters > self.prompt_characters),
            ("messages", self.messages is not None and len(messages) > self.messages),
            ("max_tokens", self.max_tokens is not None and most > self.max_tokens),
        )
        return next((f"large; why={why}" for why, holds in reasons if holds), "small")


class Table(BaseModel, extra="forbid"):
    upstreams: dict[str, UpstreamRow]
    routes: list[RouteRow]
    aliases: list[AliasRow] = []
    auto: AutoRow | None = None
    defaults: dict[str, dict[str, dict[str, Any]]] = {}

    @model_validator(mode="after")
    def _names(self) -> Table:
        if sum(row.kind == "model" for row in self.upstreams.values()) != 1:
            raise ValueError("exactly one upstream must be of the kind `model`")
        for name, upstream in self.upstreams.items():
            if not upstream.native and upstream.kind != "model":
                raise ValueError(f"upstream {name!r}: `native: false` is for the kind `model`")
            if upstream.openai_key and upstream.native:
                raise ValueError(f"upstream {name!r}: `openai_key` is for the kind `model` with `native: false`")
            if upstream.kind == "model" and upstream.api_key_file is not None:
                raise ValueError(f"upstream {name!r}: `api_key_file` is for the kind `openai`")
        for row in self.routes:
            for named in (row.upstream, *(fallback.upstream for fallback in row.fallbacks)):
                if named not in self.upstreams:
                    raise ValueError(f"routes name the upstream {named!r}, which `upstreams` does not have")
            if row.match is None and self.upstreams[row.upstream].kind != "model":
                raise ValueError(f"the route to {row.upstream!r} needs `match`")
        for name, upstream in self.upstreams.items():
            if upstream.defaults is not None and upstream.defaults not in self.defaults | default_tables():
                raise ValueError(f"upstream {name!r} names the defaults {upstream.defaults!r}, which do not exist")
        return self


@dataclass(frozen=True, slots=True)
class Cap:
    """Limits of an upstream for all keys together; `day`: pico-dollars. None: no limit."""

    rpm: int | None
    tpm: int | None
    day: int | None


@dataclass(frozen=True, slots=True)
class UpstreamConfig:
    """Address and features of one upstream. `base_url` ends before the endpoint's path; `key`: None if keyless.

    `native`: the lab's model service, which has a path for each model, revisions and usage by call.
    """

    name: str
    kind: str
    base_url: str
    key: str | None = field(repr=False)
    configured: bool
    stream_usage: bool
    responses: bool = False
    forward_proxy: str | None = field(default=None, repr=False)  # it may hold a password
    native: bool = False
    cap: Cap | None = field(default=None, compare=False)  # another cap needs no other client


@dataclass(frozen=True, slots=True)
class Target:
    """Upstream and model of one request, and the rules for caching its answer."""

    upstream: str
    model: str
    revision: str | None  # None if the upstream reports none
    versioned: bool  # the upstream sends a revision with every answer
    alias: str | None  # the requested name, if it is not `model`
    ttl: int
    store_sampled: bool
    defaults: Mapping[str, Mapping[str, bytes]]  # endpoint -> field -> canonical bytes
    default_temperature: Mapping[str, Any]  # endpoint -> default temperature, if known
    config: UpstreamConfig
    kind: str | None = None  # kind of the model, as the model service reports it
    auto: str | None = None  # `small` or `large` with its reason, if `auto` was requested
    samples: int = 1  # number of sampled answers stored for one request
    stale_while_revalidate: int = 0  # seconds after the TTL in which a stale entry is served during revalidation
    stale_if_error: int = 0  # seconds after the TTL in which a stale entry is served if the upstream fails
    fallbacks: tuple[Target, ...] = ()

    @property
    def place(self) -> tuple[str, str]:
        return self.upstream, self.model


@dataclass(frozen=True, slots=True)
class _Read:
    """One reading of the routes file, joined with the settings. The last two: by upstream and endpoint."""

    table: Table
    configs: Mapping[str, UpstreamConfig]
    defaults: Mapping[str, Mapping[str, Mapping[str, bytes]]]
    temperatures: Mapping[str, Mapping[str, Any]]

    def is_on(self, upstream: str | None) -> bool:
        config = self.configs.get(upstream or "")
        return config is not None and config.configured


class Routes:
    """The routes file, joined with the settings. Raises ValueError with one line that names the fault."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._now = _read(settings)
        self._targets: dict[str, Target] = {}  # by name; they are of `_now` and of the model list `_local`
        self._local: Listed = {}
        self.generation = 1  # grows with each reload: cached plans become invalid

    @property
    def upstreams(self) -> Mapping[str, UpstreamConfig]:
        return self._now.configs

    def files(self) -> list[Path]:
        """The routes file and the key files that it names."""
        rows = self._now.table.upstreams.values()
        named = (self._settings.routes_file, self._settings.openai_api_key_file, *(row.api_key_file for row in rows))
        return [path for path in named if path is not None]

    def reload(self) -> None:
        """Read the files again. Raises ValueError and changes nothing if one is faulty."""
        self._now, self._targets = _read(self._settings), {}
        self.generation += 1

    def resolve(self, asked: str, local: Listed, body: Mapping[str, Any] | None = None) -> Target:
        """The target of the requested name. `local`: the model list, empty while unknown. `body`: read for `auto`.
        Raises ModelNotFound, or UpstreamDown if the name may belong to a model of the unknown list."""
        if self._local is not local or len(self._targets) > MAX_CACHED_NAMES:
            self._targets, self._local = {}, local
        target = self._targets.get(asked)
        if target is None:
            target = self._find(asked, local, body)
            if target.auto is None:
                self._targets[asked] = target
        return target

    def _find(self, asked: str, local: Listed, body: Mapping[str, Any] | None) -> Target:
        now, name, auto = self._now, asked, None
        if asked == AUTO and now.table.auto is not None and AUTO not in local:
            auto = now.table.auto.size(body or {})
            name = now.table.auto.small if auto == "small" else now.table.auto.large
        name = next((row.model for row in now.table.aliases if row.name == name and not now.is_on(row.unless)), name)
        for route in now.table.routes:
            patterns = route.match or ()
            is_local = now.configs[route.upstream].kind == "model"
            if name in local if is_local else any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                first = self._target(route, route.upstream, name, local, asked)
                if first is not None:
                    there = {name: entry for name, entry in local.items() if usable(entry)}
                    fallbacks = [self._target(route, row.upstream, row.model, there, asked) for row in route.fallbacks]
                    others = tuple(each for each in fallbacks if each and each.place != first.place)
                    return replace(first, auto=auto, fallbacks=others)
        if not local:  # one upstream is the model service
            why = f"The model service does not answer, so it is not known whether it has `{asked}`. "
            why += "Start the lab with `make start`, or see `make logs`; in containers: `docker compose ps`."
            raise UpstreamDown(why, param="model", headers={"retry-after": "2"})
        raise ModelNotFound(f"The model `{asked}` does not exist. {self._available(local)}", name)

    def aliases(self, local: Mapping[str, Any]) -> dict[str, str]:
        """The aliases that are active now, and their models."""
        now = self._now
        return {row.name: row.model for row in now.table.aliases if not now.is_on(row.unless) and row.model in local}

    def _target(self, route: RouteRow, upstream: str, model: str, local: Listed, asked: str) -> Target | None:
        """A model at an upstream, with the route's rules; None if it is not there, or the upstream is off."""
        now, config = self._now, self._now.configs[upstream]
        is_local = config.kind == "model"
        if model not in local if is_local else not config.configured:
            return None
        listed = local[model] if config.native else {}
        return Target(
            upstream=upstream,
            model=model,
            revision=listed.get("revision"),
            versioned=config.native,
            alias=asked if model != asked else None,
            ttl=route.ttl_seconds or self._settings.cache_ttl_seconds,
            store_sampled=route.store_sampled,
            defaults=now.defaults[upstream],
            default_temperature=now.temperatures[upstream],
            config=config,
            kind=listed.get("kind"),
            samples=route.samples,
            stale_while_revalidate=route.stale_while_revalidate_seconds,
            stale_if_error=route.stale_if_error_seconds,
        )

    def _available(self, local: Mapping[str, Any]) -> str:
        text = [f"Models: {', '.join([*local, *self.aliases(local)])}."]
        for route in self._now.table.routes:
            if route.match:
                until = "" if self._now.is_on(route.upstream) else " once it has a key (PROXY_OPENAI_API_KEY)"
                text.append(f"Names like {', '.join(route.match)} go to {route.upstream}{until}.")
        return " ".join(text)


def usable(entry: Mapping[str, Any]) -> bool:
    """Whether a request may go to this model of the list: it is in memory, or is loaded by the request."""
    return entry.get("state", "ready") in ("ready", "unloaded", "loading")


def _read(settings: Settings) -> _Read:
    table = read_yaml(Table, settings.routes_file, "upstreams/routes.yaml", "PROXY_ROUTES_FILE")
    configs = {name: _config(name, row, settings) for name, row in table.upstreams.items()}
    tables, encoded = default_tables() | table.defaults, {}
    for name, paths in tables.items():
        try:
            json.dumps(paths, allow_nan=False)
            encoded[name] = {path: {k: encode(v) for k, v in fields.items()} for path, fields in paths.items()}
        except (TypeError, AttributeError, ValueError, RecursionError):  # YAML has dates, and keys that are no strings
            raise ValueError(f"PROXY_ROUTES_FILE is wrong at defaults.{name}: the values are not JSON") from None
    defaults, temperatures = {}, {}
    for name, row in table.upstreams.items():
        known = row.base_url or row.kind == "model" or settings.openai_base_url == OPENAI_URL
        own = row.defaults if row.defaults and known else None
        defaults[name] = encoded[own] if own else {}
        temperatures[name] = {path: fields.get("temperature") for path, fields in tables[own].items()} if own else {}
    return _Read(table, configs, defaults, temperatures)


def _config(name: str, row: UpstreamRow, settings: Settings) -> UpstreamConfig:
    day = None if row.usd_per_day is None else money.from_usd(row.usd_per_day)
    cap = None if (row.rpm, row.tpm, day) == (None, None, None) else Cap(row.rpm, row.tpm, day)
    if row.kind == "model":
        url = row.base_url or settings.model_url
        key, proxy = (settings.openai_key(), forward_proxy(url)) if row.openai_key else (None, None)
        return UpstreamConfig(name, row.kind, url, key, True, row.stream_usage, row.responses, proxy, row.native, cap)
    key, url = None, (row.base_url or settings.openai_base_url).rstrip("/")
    if row.base_url is None:
        key = settings.openai_key()
    elif row.api_key_file is not None:
        try:
            key = row.api_key_file.read_text().strip() or None
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"PROXY_ROUTES_FILE: the key file of upstream {name} cannot be read: {error}") from None
    configured = key is not None or (row.base_url is not None and row.keyless)
    proxy = forward_proxy(url) if configured else None
    return UpstreamConfig(name, row.kind, url, key, configured, row.stream_usage, row.responses, proxy, cap=cap)
