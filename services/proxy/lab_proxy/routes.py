"""Which upstream answers a model's name, and what the cache may do there: one YAML file.

Knows names, patterns, aliases and tables of defaults. Speaks to nobody: the ids of the model service are handed in.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from .canonical import encode
from .errors import NoSuchModel, UpstreamDown
from .settings import Settings

OPENAI_URL = "https://api.openai.com/v1"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class UpstreamRow(_Strict):
    kind: Literal["model", "openai"]
    base_url: str | None = None
    api_key_file: Path | None = None
    keyless: bool = False
    defaults: str | None = None
    stream_usage: bool = True


class RouteRow(_Strict):
    upstream: str
    match: list[str] | None = None
    ttl_seconds: int | None = None
    store_sampled: bool = False


class AliasRow(_Strict):
    name: str
    model: str
    unless: str | None = None


class Table(_Strict):
    """The routes file."""

    upstreams: dict[str, UpstreamRow]
    routes: list[RouteRow]
    aliases: list[AliasRow] = []
    defaults: dict[str, dict[str, dict[str, Any]]] = {}

    @model_validator(mode="after")
    def _names(self) -> Table:
        for row in self.routes:
            if row.upstream not in self.upstreams:
                raise ValueError(f"routes name the upstream {row.upstream!r}, which is not among upstreams")
            if row.match is None and self.upstreams[row.upstream].kind != "model":
                raise ValueError(f"the route to {row.upstream!r} needs `match`")
            if row.ttl_seconds is not None and row.ttl_seconds < 1:
                raise ValueError("ttl_seconds must be at least 1")
        for name, upstream in self.upstreams.items():
            if upstream.defaults is not None and upstream.defaults not in self.defaults:
                raise ValueError(f"upstream {name!r} names the defaults {upstream.defaults!r}, which are not there")
        return self


@dataclass(frozen=True, slots=True)
class Access:
    """How one upstream is reached. `base_url` ends before the endpoint's path; `key` is None for a keyless one."""

    name: str
    kind: str
    base_url: str
    key: str | None = field(repr=False)
    configured: bool
    stream_usage: bool


@dataclass(frozen=True, slots=True)
class Target:
    """Where one request goes, and on what terms its answer is cached."""

    upstream: str
    model: str
    revision: str | None  # None at an upstream that tells of none
    versioned: bool  # the upstream names a revision with every answer
    alias: str | None
    ttl: int
    keep_sampled: bool
    defaults: Mapping[str, Mapping[str, bytes]]  # endpoint -> field -> canonical bytes
    temperature: Mapping[str, Any]  # endpoint -> the default, where it is known


class Routes:
    """The routes file, joined with the settings. Raises ValueError with one line that says what is wrong."""

    def __init__(self, settings: Settings) -> None:
        table = _load(settings.routes_file)
        self.access = {name: _access(name, row, settings) for name, row in table.upstreams.items()}
        self._table = table
        self._ttl = settings.cache_ttl_seconds
        self._defaults: dict[str, Mapping[str, Mapping[str, Any]]] = {}
        for name, row in table.upstreams.items():
            known = row.defaults and (row.base_url or row.kind == "model" or settings.openai_base_url == OPENAI_URL)
            self._defaults[name] = table.defaults[row.defaults] if row.defaults and known else {}
        self._canonical = {
            name: {path: {k: encode(v) for k, v in fields.items()} for path, fields in tables.items()}
            for name, tables in self._defaults.items()
        }

    def resolve(self, asked: str, local: Mapping[str, Mapping[str, Any]]) -> Target:
        """`local`: the model service's entries by id, empty while they are not known.

        Raises NoSuchModel, or UpstreamDown where the name may be one of the ids that are not known yet.
        """
        name = asked
        for row in self._table.aliases:
            if row.name == asked and not self._on(row.unless):
                name = row.model
        for route in self._table.routes:
            access = self.access[route.upstream]
            if not access.configured:
                continue
            if name in local if access.kind == "model" else self._fits(route, name):
                return self._target(route, name, asked if name != asked else None, local.get(name, {}))
        if not local and any(access.kind == "model" for access in self.access.values()):
            raise UpstreamDown(
                f"The model service does not answer, so it is not known whether it has `{asked}`. "
                "Start the lab with `make start`, or look at `make logs`; in containers: `docker compose ps`.",
                param="model",
                headers={"retry-after": "2"},
            )
        raise NoSuchModel(f"The model `{asked}` does not exist here. {self._there_is(local)}", name)

    def aliases(self, local: Mapping[str, Any]) -> dict[str, str]:
        """The aliases that work now, with the model each stands for."""
        return {row.name: row.model for row in self._table.aliases if not self._on(row.unless) and row.model in local}

    def _on(self, upstream: str | None) -> bool:
        return upstream is not None and upstream in self.access and self.access[upstream].configured

    def _fits(self, route: RouteRow, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in route.match or ())

    def _target(self, route: RouteRow, name: str, alias: str | None, listed: Mapping[str, Any]) -> Target:
        known = self._defaults[route.upstream]
        return Target(
            upstream=route.upstream,
            model=name,
            revision=listed.get("revision"),
            versioned=self.access[route.upstream].kind == "model",
            alias=alias,
            ttl=route.ttl_seconds or self._ttl,
            keep_sampled=route.store_sampled,
            defaults=self._canonical[route.upstream],
            temperature={path: fields.get("temperature") for path, fields in known.items()},
        )

    def _there_is(self, local: Mapping[str, Any]) -> str:
        names = ", ".join([*local, *self.aliases(local)])
        said = [f"There is: {names}."]
        for route in self._table.routes:
            if route.match:
                way = "" if self.access[route.upstream].configured else " once it has a key (PROXY_OPENAI_API_KEY)"
                said.append(f"Names like {', '.join(route.match)} go to {route.upstream}{way}.")
        return " ".join(said)


def _load(path: Path | None) -> Table:
    try:
        if path is None:
            text = resources.files("lab_proxy").joinpath("routes.yaml").read_text("utf-8")
        else:
            text = path.read_text("utf-8")
        return Table.model_validate(yaml.safe_load(text))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"PROXY_ROUTES_FILE cannot be read: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"PROXY_ROUTES_FILE is wrong at {where or 'the top'}: {first['msg']}") from None


def _access(name: str, row: UpstreamRow, settings: Settings) -> Access:
    if row.kind == "model":
        return Access(name, row.kind, row.base_url or settings.model_url, None, True, row.stream_usage)
    if row.base_url is None:
        key = settings.openai_key()
        return Access(name, row.kind, settings.openai_base_url, key, key is not None, row.stream_usage)
    key = None
    if row.api_key_file is not None:
        try:
            key = row.api_key_file.read_text().strip() or None
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"PROXY_ROUTES_FILE: the key file of upstream {name} cannot be read: {error}") from None
    return Access(name, row.kind, row.base_url.rstrip("/"), key, row.keyless or key is not None, row.stream_usage)
