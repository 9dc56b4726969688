"""The proxy's settings, read from the environment. No other module reads the environment."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

REMOVED = {
    "PROXY_WORKERS": "a proxy is one process; run replicas behind the gate (compose.scale.yaml) or a Kubernetes Service"
}

Names = Annotated[tuple[str, ...], NoDecode]


def is_http(url: str) -> bool:
    """The URL names an HTTP host that requests can be sent to."""
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets or a port that are none
        return False


def forward_proxy(url: str) -> str | None:
    """The forward proxy for requests to this URL: HTTPS_PROXY or HTTP_PROXY, unless NO_PROXY names the host. Raises
    ValueError for a proxy that is no HTTP proxy."""
    parts = urlsplit(url)
    found = getproxies().get(parts.scheme)
    if not found or proxy_bypass(parts.hostname or "") or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    found = found if "://" in found else f"http://{found}"
    if not is_http(found):
        raise ValueError(f"{parts.scheme.upper()}_PROXY must be an http:// or https:// URL")
    return found


class Settings(BaseSettings, env_prefix="PROXY_", env_ignore_empty=True, extra="ignore", use_attribute_docstrings=True):
    """Field `name` is the variable `PROXY_NAME`. Lists are separated by commas, times are in seconds."""

    host: str = "127.0.0.1"
    """Address the proxy listens on."""
    port: int = Field(8080, ge=1, le=65535)
    """Port the proxy listens on."""
    allow_anonymous: bool = False
    """Permit a `PROXY_HOST` beyond loopback although no keys are required. Otherwise such a start fails."""
    admin_key: SecretStr | None = None
    """Admin key of the operator's pages. If set, every caller needs a virtual key. A weak admin key is refused."""
    admin_key_file: Path | None = None
    """File with the admin key; an empty file means no key."""
    require_keys: bool = False
    """Require a virtual key from every caller, even without an admin key."""
    metrics_public: bool = False
    """If keys are required: answer `/metrics` and `/status` without a key too, as Prometheus needs."""
    limits_when_redis_is_down: Literal["open", "closed"] = "open"
    """Requests of limited keys while redis is down: `open` admits them, `closed` answers 503."""
    prices_file: Path | None = None
    """YAML file of prices per million tokens. Default: the packaged prices.yaml."""
    ledger_folder: Path | None = None
    """Folder of the disk queue: charges that redis does not accept. Default: beside the cache secret."""
    ledger_spool_bytes: int = Field(64 * 1024 * 1024, ge=0)
    """Size of the disk queue of one process; further charges wait in memory."""
    allowed_hosts: Names = ()
    """Allowed Host names besides loopback, `proxy` and IP addresses; `*` for any. Prevents DNS rebinding."""
    allowed_origins: Names = ()
    """Origins of web pages that may call the proxy (`https://lab.example`); others get a 403."""
    model_url: str = "http://127.0.0.1:8000"
    """Base URL of the model service."""
    model_poll_seconds: float = Field(1.5, gt=0, le=60)
    """Interval at which the model service's list of models is read."""
    openai_api_key: SecretStr | None = None
    """API key of the OpenAI upstream; without one this upstream is off."""
    openai_api_key_file: Path | None = None
    """File with the API key of the OpenAI upstream."""
    openai_base_url: str = "https://api.openai.com/v1"
    """Base URL of the OpenAI upstream or of a compatible API."""
    routes_file: Path | None = None
    """YAML file of upstreams, routes and aliases. Default: the packaged routes.yaml."""
    redis_url: str = "redis://127.0.0.1:6379/0"
    """URL of redis: cache, keys, limits and ledger."""
    redis_timeout_ms: int = Field(60, ge=1, le=10_000)
    """Timeout of one redis read or write; on timeout the request goes on without the cache."""
    cache_enabled: bool = True
    """Use the response cache."""
    cache_ttl_seconds: int = Field(86_400, ge=1, le=31_536_000)
    """TTL of cache entries; a route may set its own."""
    cache_max_entry_bytes: int = Field(1_048_576, ge=1)
    """Largest cache entry; larger answers are not stored."""
    cache_near_bytes: int = Field(64 * 1024 * 1024, ge=0)
    """Memory of local copies of cache entries; 0 turns local copies off."""
    cache_secret_file: Path = Path(".state/cache-secret")
    """File with the secret of the cache keys; created at the first start."""
    files_enabled: bool = True
    """Offer /v1/files and /v1/batches. Switch it off if replicas share no folder; then both answer 501."""
    files_dir: Path | None = None
    """Folder of uploaded files and batches, shared by replicas. Default: `files` beside the secret."""
    files_max_bytes: int = Field(64 * 1024 * 1024, ge=1024)
    """Largest file at /v1/files; larger ones get a 413."""
    files_total_bytes: int = Field(1024 * 1024 * 1024, ge=1024)
    """Total size of one owner's files; beyond it a 413."""
    batch_concurrency: int = Field(4, ge=0, le=256)
    """Concurrent batch lines per process; 0: this process runs no batches."""
    max_body_bytes: int = Field(8 * 1024 * 1024, ge=1024)
    """Largest request body; larger ones get a 413."""
    head_timeout_seconds: float = Field(30, gt=0, description="Time limit for reading a request's head.")
    body_timeout_seconds: float = Field(30, gt=0)
    """Time limit for reading a request's body."""
    connect_timeout_seconds: float = Field(5, gt=0)
    """Time limit for connecting to an upstream."""
    first_byte_timeout_seconds: float = Field(120, gt=0)
    """Time limit for the first byte of a streamed answer."""
    idle_timeout_seconds: float = Field(60, gt=0)
    """Longest pause within a streamed answer."""
    total_timeout_seconds: float = Field(600, gt=0)
    """Time limit for one answer, streamed or not."""
    upstream_retries: int = Field(2, ge=0, le=10)
    """Retries of an upstream call that failed before its first byte."""
    drain_timeout_seconds: int = Field(30, ge=0)
    """Graceful drain after SIGTERM: time for running answers to finish."""
    otlp_endpoint: str | None = Field(
        None,
        validate_default=True,
        description="OTLP/HTTP endpoint for OpenTelemetry traces (`http://127.0.0.1:4318`); needs `lab-proxy[otel]`. "
        "Default: `OTEL_EXPORTER_OTLP_ENDPOINT`.",
    )
    log_format: Literal["auto", "json", "text"] = "auto"
    """Log format on stderr; `auto`: text on a terminal, JSON otherwise."""

    @field_validator("allowed_hosts", "allowed_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        parts = value.split(",") if isinstance(value, str) else ()
        return tuple(part.strip().lower() for part in parts if part.strip()) if isinstance(value, str) else value

    @field_validator("model_url", "openai_base_url", "otlp_endpoint", "redis_url")
    @classmethod
    def _url(cls, value: str | None, info: ValidationInfo) -> str | None:
        if info.field_name == "redis_url":
            if not str(value).startswith(("redis://", "rediss://", "unix://")):
                raise ValueError("must be a redis://, rediss:// or unix:// URL")
            return value
        if info.field_name == "otlp_endpoint":
            value = value or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None
            if value is not None and not value.startswith(("http://", "https://")):
                raise ValueError("must be an http:// or https:// URL")
        elif not is_http(str(value)) or "@" in str(value) or "?" in str(value):
            raise ValueError("must be an http:// or https:// URL without a user and without a query")
        return value.rstrip("/") if value else None

    @model_validator(mode="after")
    def _check(self) -> Settings:
        for name in ("admin_key", "openai_api_key"):
            if getattr(self, name) and getattr(self, f"{name}_file"):
                raise ValueError(f"PROXY_{name.upper()} and PROXY_{name.upper()}_FILE are both set: keep one")
        if not (self.keys_required or self.allow_anonymous or self.host in LOOPBACK):
            raise ValueError(
                f"PROXY_HOST={self.host} lets others use the proxy, and your upstream key, without a key: listen on "
                "127.0.0.1, require virtual keys (PROXY_ADMIN_KEY_FILE), "
                "or set PROXY_ALLOW_ANONYMOUS=true if the port is protected"
            )
        return self

    def _secret(self, name: str) -> str | None:
        """A key by its setting or its file. Raises ValueError, with the variable, for an unreadable file."""
        given, file = getattr(self, name), getattr(self, f"{name}_file")
        try:
            text = file.read_text() if file else given.get_secret_value() if given else ""
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"PROXY_{name.upper()}_FILE cannot be read: {error}") from None
        return text.strip() or None

    def openai_key(self) -> str | None:
        """The API key of the OpenAI upstream, or None. Raises ValueError, with the variable, for an unreadable file."""
        return self._secret("openai_api_key")

    def operator_key(self) -> str | None:
        """The admin key, or None. Raises ValueError that names the variable for a weak key or an unreadable file."""
        key = self._secret("admin_key")
        if key and (why := admin_key_weakness(key)):
            name = "PROXY_ADMIN_KEY_FILE" if self.admin_key_file else "PROXY_ADMIN_KEY"
            raise ValueError(f"{name} is weak: {why}. `openssl rand -hex 32` makes a good one")
        return key

    @property
    def keys_required(self) -> bool:
        """Every caller needs a virtual key. Raises like `operator_key`."""
        return self.operator_key() is not None or self.require_keys

    @property
    def files_folder(self) -> Path:
        """Folder of uploads and batches."""
        return self.files_dir or self.cache_secret_file.parent / "files"

    @property
    def disk_queue_folder(self) -> Path:
        """Folder of charges that redis did not accept."""
        return self.ledger_folder or self.cache_secret_file.parent


def removed_settings() -> list[str]:
    """A line for each variable of the environment that is no longer a setting, with what replaces it."""
    return [f"{name} was removed, it is ignored: {why}" for name, why in REMOVED.items() if os.environ.get(name)]


def admin_key_weakness(admin_key: str) -> str | None:
    """Why this admin key could be guessed, or None. The text does not contain the key."""
    if len(admin_key) < 24:
        return "it has fewer than 24 characters"
    lower = admin_key.lower()
    rest = lower
    for word in _COMMON_WORDS:
        rest = rest.replace(word, "")
    if len(rest) < 20:
        return "most of it is common words"
    if admin_key in (admin_key + admin_key)[1:-1]:
        return "it repeats itself"
    steps = [ord(b) - ord(a) for a, b in itertools.pairwise(lower)]
    if sum(step in {-1, 0, 1} for step in steps) > len(steps) / 2:
        return "it is a sequence of letters or digits"
    counts = Counter(admin_key)
    if len(counts) < 10 or max(counts.values()) > len(admin_key) / 3:
        return "it uses too few different characters"
    return None


_COMMON_WORDS = (
    "administrator", "correct", "horse", "battery", "staple", "changeme", "change", "password", "passw0rd",
    "qwertyuiop", "qwerty", "letmein", "welcome", "default", "example", "insecure", "secret", "master", "replace",
    "student", "teacher", "admin", "dummy", "proxy", "openai", "litellm", "virtual", "token", "guest", "test",
    "root", "user", "sk-lab-", "sk-", "llm-lab", "llm", "lab", "key", "123456789", "12345678", "1234567", "123456",
    "12345", "1234", "abcdef", "abc",
)  # fmt: skip
