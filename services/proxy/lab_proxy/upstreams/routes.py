"""Which upstream answers a model's name, who stands in for it, and what the cache may do there: one YAML file.

Knows names, patterns, aliases and tables of defaults. Speaks to nobody: the ids of the model service are handed in.
Read anew it changes as a whole, or not at all.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..canonical import encode
from ..errors import ModelNotFound, UpstreamDown
from ..reload import read_yaml
from ..settings import Settings, is_http

OPENAI_URL = "https://api.openai.com/v1"
AUTO = "auto"
MOST_NAMES = 1000  # of models, whose targets are kept: callers may invent any number of them

Listed = Mapping[str, Mapping[str, Any]]  # the model service's entries by id


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class UpstreamRow(_Strict):
    kind: Literal["model", "openai"]
    base_url: str | None = None
    api_key_file: Path | None = None
    keyless: bool = False
    defaults: str | None = None
    stream_usage: bool = True
    responses: bool = False

    @field_validator("base_url")
    @classmethod
    def _http_url(cls, value: str | None) -> str | None:
        if value is not None and (not is_http(value) or "?" in value):
            raise ValueError("must be an http:// or https:// URL without a query")
        return value


class FallbackRow(_Strict):
    upstream: str
    model: str


class RouteRow(_Strict):
    upstream: str
    match: list[str] | None = None
    ttl_seconds: int | None = Field(None, ge=1)
    store_sampled: bool = False
    samples: int = Field(1, ge=1, le=100)
    stale_while_revalidate_seconds: int = Field(0, ge=0)
    stale_if_error_seconds: int = Field(0, ge=0)
    fallbacks: list[FallbackRow] = []


class AliasRow(_Strict):
    name: str
    model: str
    unless: str | None = None


class AutoRow(_Strict):
    """What `model: "auto"` stands for. None of a threshold: it is not looked at."""

    small: str
    large: str
    prompt_characters: int | None = Field(None, ge=1)
    messages: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    large_for: list[Literal["tools", "response_format", "images"]] = []

    def size(self, body: Mapping[str, Any]) -> str:
        """`small`, or `large` and why: the first of the reasons that holds."""
        messages = body.get("messages")
        messages = messages if isinstance(messages, list) else []
        form = body.get("response_format")
        form = form.get("type", "text") if isinstance(form, dict) else "text"
        given = [each.get("content") for each in messages if isinstance(each, dict)]
        given += [body.get(name) for name in ("prompt", "input", "instructions")]
        characters, images = 0, False
        for content in given:
            for part in content if isinstance(content, list) else [content]:
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


class Table(_Strict):
    """The routes file."""

    upstreams: dict[str, UpstreamRow]
    routes: list[RouteRow]
    aliases: list[AliasRow] = []
    auto: AutoRow | None = None
    defaults: dict[str, dict[str, dict[str, Any]]] = {}

    @model_validator(mode="after")
    def _names(self) -> Table:
        if sum(row.kind == "model" for row in self.upstreams.values()) != 1:
            raise ValueError("exactly one upstream is of the kind `model`")
        for row in self.routes:
            for named in (row.upstream, *(fallback.upstream for fallback in row.fallbacks)):
                if named not in self.upstreams:
                    raise ValueError(f"routes name the upstream {named!r}, which is not among upstreams")
            if row.match is None and self.upstreams[row.upstream].kind != "model":
                raise ValueError(f"the route to {row.upstream!r} needs `match`")
        for name, upstream in self.upstreams.items():
            if upstream.defaults is not None and upstream.defaults not in self.defaults:
                raise ValueError(f"upstream {name!r} names the defaults {upstream.defaults!r}, which are not there")
        return self


@dataclass(frozen=True, slots=True)
class UpstreamConfig:
    """How one upstream is reached. `base_url` ends before the endpoint's path; `key` is None for a keyless one."""

    name: str
    kind: str
    base_url: str
    key: str | None = field(repr=False)
    configured: bool
    stream_usage: bool
    responses: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """Where one request goes, and on what terms its answer is cached."""

    upstream: str
    model: str
    revision: str | None  # None at an upstream that tells of none
    versioned: bool  # the upstream names a revision with every answer
    alias: str | None  # the name that was asked for, where it is not `model`
    ttl: int
    store_sampled: bool
    defaults: Mapping[str, Mapping[str, bytes]]  # endpoint -> field -> canonical bytes
    default_temperature: Mapping[str, Any]  # endpoint -> the default, where it is known
    config: UpstreamConfig
    kind: str | None = None  # what the model service says its model is
    auto: str | None = None  # `small` or `large` and why, where `auto` was asked for
    samples: int = 1  # answers kept side by side where sampled ones are stored
    stale_while_revalidate: int = (
        0  # seconds after the TTL in which a stale answer is served while a new one is fetched
    )
    stale_if_error: int = 0  # seconds after the TTL in which a stale answer is served where the upstream fails
    fallbacks: tuple[Target, ...] = ()


@dataclass(frozen=True, slots=True)
class _Read:
    """The routes file as it was read once, joined with the settings."""

    table: Table
    access: Mapping[str, UpstreamConfig]
    defaults: Mapping[str, Mapping[str, Mapping[str, Any]]]
    canonical: Mapping[str, Mapping[str, Mapping[str, bytes]]]


class Routes:
    """The routes file, joined with the settings. Raises ValueError with one line that says what is wrong."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ttl = settings.cache_ttl_seconds
        self._now = _read(settings)
        self._known: dict[str, Target] = {}
        self._known_for: tuple[_Read, Listed] = (self._now, {})
        self.generation = 1  # what was decided by an earlier one is decided anew

    @property
    def upstreams(self) -> Mapping[str, UpstreamConfig]:
        return self._now.access

    def files(self) -> list[Path]:
        """What `reload` reads: the routes file and the files of keys."""
        rows = self._now.table.upstreams.values()
        named = (self._settings.routes_file, self._settings.openai_api_key_file, *(row.api_key_file for row in rows))
        return [path for path in named if path is not None]

    def reload(self) -> None:
        """Read the files again. Raises ValueError and changes nothing where they are no good."""
        self._now = _read(self._settings)
        self.generation += 1

    def resolve(self, asked: str, local: Listed, body: Mapping[str, Any] | None = None) -> Target:
        """`local`: the model service's entries by id, empty while they are not known. `body`: what `auto` looks at.

        What was found for a name holds as long as the table and `local` are the same objects.

        Raises NoSuchModel, or UpstreamDown where the name may be one of the ids that are not known yet.
        """
        if self._known_for[0] is not self._now or self._known_for[1] is not local or len(self._known) > MOST_NAMES:
            self._known, self._known_for = {}, (self._now, local)
        target = self._known.get(asked)
        if target is None:
            target = self._find(asked, local, body)
            if target.auto is None:
                self._known[asked] = target
        return target

    def _find(self, asked: str, local: Listed, body: Mapping[str, Any] | None) -> Target:
        now, name, auto = self._now, asked, None
        if asked == AUTO and now.table.auto is not None and AUTO not in local:
            auto = now.table.auto.size(body or {})
            name = now.table.auto.small if auto == "small" else now.table.auto.large
        for row in now.table.aliases:
            if row.name == name and not _on(now, row.unless):
                name = row.model
                break
        for route in now.table.routes:
            access = now.access[route.upstream]
            if not access.configured:
                continue
            if name in local if access.kind == "model" else _fits(route, name):
                listed = local.get(name, {}) if access.kind == "model" else {}
                first = self._target(now, route, FallbackRow(upstream=route.upstream, model=name), listed, asked=asked)
                return replace(first, auto=auto, fallbacks=self._fallbacks(now, route, local, first))
        if not local and any(access.kind == "model" for access in now.access.values()):
            raise UpstreamDown(
                f"The model service does not answer, so it is not known whether it has `{asked}`. "
                "Start the lab with `make start`, or look at `make logs`; in containers: `docker compose ps`.",
                param="model",
                headers={"retry-after": "2"},
            )
        raise ModelNotFound(f"The model `{asked}` does not exist here. {self._there_is(local)}", name)

    def aliases(self, local: Mapping[str, Any]) -> dict[str, str]:
        """The aliases that work now, with the model each stands for."""
        now = self._now
        return {row.name: row.model for row in now.table.aliases if not _on(now, row.unless) and row.model in local}

    def _fallbacks(self, now: _Read, route: RouteRow, local: Listed, first: Target) -> tuple[Target, ...]:
        """Those that can be asked now."""
        found = []
        for row in route.fallbacks:
            is_local = now.access[row.upstream].kind == "model"
            there = row.model in local if is_local else now.access[row.upstream].configured
            if there and (row.upstream, row.model) != (first.upstream, first.model):
                listed = local[row.model] if is_local else {}
                found.append(self._target(now, route, row, listed, asked=first.alias or first.model))
        return tuple(found)

    def _target(
        self, now: _Read, route: RouteRow, who: FallbackRow, listed: Mapping[str, Any], *, asked: str
    ) -> Target:
        """`who` on the route's terms. `listed`: what the model service tells of the model."""
        access = now.access[who.upstream]
        return Target(
            upstream=who.upstream,
            model=who.model,
            revision=listed.get("revision"),
            versioned=access.kind == "model",
            alias=asked if who.model != asked else None,
            ttl=route.ttl_seconds or self._ttl,
            store_sampled=route.store_sampled,
            defaults=now.canonical[who.upstream],
            default_temperature={
                path: fields.get("temperature") for path, fields in now.defaults[who.upstream].items()
            },
            config=access,
            kind=listed.get("kind"),
            samples=route.samples,
            stale_while_revalidate=route.stale_while_revalidate_seconds,
            stale_if_error=route.stale_if_error_seconds,
        )

    def _there_is(self, local: Mapping[str, Any]) -> str:
        now = self._now
        names = ", ".join([*local, *self.aliases(local)])
        said = [f"There is: {names}."]
        for route in now.table.routes:
            if route.match:
                way = "" if now.access[route.upstream].configured else " once it has a key (PROXY_OPENAI_API_KEY)"
                said.append(f"Names like {', '.join(route.match)} go to {route.upstream}{way}.")
        return " ".join(said)


def _on(now: _Read, upstream: str | None) -> bool:
    return upstream is not None and upstream in now.access and now.access[upstream].configured


def _fits(route: RouteRow, name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in route.match or ())


def _read(settings: Settings) -> _Read:
    table = read_yaml(Table, settings.routes_file, "upstreams/routes.yaml", "PROXY_ROUTES_FILE")
    access = {name: _access(name, row, settings) for name, row in table.upstreams.items()}
    defaults: dict[str, Mapping[str, Mapping[str, Any]]] = {}
    for name, row in table.upstreams.items():
        known = row.defaults and (row.base_url or row.kind == "model" or settings.openai_base_url == OPENAI_URL)
        defaults[name] = table.defaults[row.defaults] if row.defaults and known else {}
    canonical = {
        name: {path: {k: encode(v) for k, v in fields.items()} for path, fields in tables.items()}
        for name, tables in defaults.items()
    }
    return _Read(table, access, defaults, canonical)


def _access(name: str, row: UpstreamRow, settings: Settings) -> UpstreamConfig:
    if row.kind == "model":
        return UpstreamConfig(
            name, row.kind, row.base_url or settings.model_url, None, True, row.stream_usage, row.responses
        )
    if row.base_url is None:
        key = settings.openai_key()
        return UpstreamConfig(
            name, row.kind, settings.openai_base_url, key, key is not None, row.stream_usage, row.responses
        )
    key = None
    if row.api_key_file is not None:
        try:
            key = row.api_key_file.read_text().strip() or None
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"PROXY_ROUTES_FILE: the key file of upstream {name} cannot be read: {error}") from None
    return UpstreamConfig(
        name, row.kind, row.base_url.rstrip("/"), key, row.keyless or key is not None, row.stream_usage, row.responses
    )
