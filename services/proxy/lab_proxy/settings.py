"""What the environment may say to the proxy. Nothing else in the package reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from .keys.authentication import admin_key_weakness

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

Names = Annotated[tuple[str, ...], NoDecode]


def is_http(url: str) -> bool:
    """Whether requests can be sent there."""
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets or a port that are none
        return False


class Settings(BaseSettings):
    """Every field is the variable `PROXY_<NAME>`. Lists are separated by commas, times are seconds."""

    model_config = SettingsConfigDict(env_prefix="PROXY_", env_ignore_empty=True, extra="ignore")

    host: str = Field("127.0.0.1", description="Address the proxy listens on.")
    port: int = Field(8080, ge=1, le=65535, description="Port the proxy listens on.")
    workers: int = Field(
        1, ge=1, le=64, description="Processes that answer, on one port; more than one: a parent watches over them."
    )
    allow_anonymous: bool = Field(
        False, description="Listen on other than loopback although callers need no key. Without it such a start fails."
    )
    admin_key: SecretStr | None = Field(
        None,
        description="Key of the operator's pages. With it every caller needs a virtual key; a weak one is refused.",
    )
    admin_key_file: Path | None = Field(None, description="File that holds the admin key; an empty one holds none.")
    require_keys: bool = Field(
        False, description="Every caller needs a virtual key, also without an admin key: the command line makes them."
    )
    limits_when_redis_is_down: Literal["open", "closed"] = Field(
        "open", description="What becomes of requests of limited keys then: let through, or refused with a 503."
    )
    prices_file: Path | None = Field(
        None, description="YAML of prices per million tokens; left out: the packaged prices.yaml."
    )
    ledger_folder: Path | None = Field(
        None, description="Where charges wait that redis does not take; left out: beside the cache secret."
    )
    ledger_spool_bytes: int = Field(
        64 * 1024 * 1024, ge=0, description="How much of them each worker keeps there; more wait in memory."
    )
    allowed_hosts: Names = Field(
        (),
        description="Host names callers may use beside loopback's and `proxy`; `*` for any. Guards against rebinding.",
    )
    allowed_origins: Names = Field(
        (), description="Origins of web pages that may call the proxy (`https://lab.example`); all others get a 403."
    )
    model_url: str = Field("http://127.0.0.1:8000", description="Base URL of the model service.")
    model_poll_seconds: float = Field(
        1.5, gt=0, le=60, description="How often the model service's ids and revisions are read."
    )
    openai_api_key: SecretStr | None = Field(None, description="Key of the OpenAI upstream; without one it is off.")
    openai_api_key_file: Path | None = Field(None, description="File that holds the key of the OpenAI upstream.")
    openai_base_url: str = Field(
        "https://api.openai.com/v1", description="Base URL of the OpenAI upstream, or of any compatible one."
    )
    routes_file: Path | None = Field(
        None, description="YAML of upstreams, name patterns, aliases and defaults; left out: the packaged routes.yaml."
    )
    redis_url: str = Field("redis://127.0.0.1:6379/0", description="Where answers are cached.")
    redis_timeout_ms: int = Field(
        60,
        ge=1,
        le=10_000,
        description="Longest wait for redis in one read or write; then the cache is left out for a while.",
    )
    cache_enabled: bool = Field(True, description="Cache answers at all.")
    cache_ttl_seconds: int = Field(
        86_400, ge=1, le=31_536_000, description="How long an answer is kept, unless its route says otherwise."
    )
    cache_max_entry_bytes: int = Field(1_048_576, ge=1, description="Larger answers are not stored.")
    cache_near_bytes: int = Field(
        64 * 1024 * 1024,
        ge=0,
        description="Memory that each worker's own copies of answers may take; 0: none are kept.",
    )
    cache_secret_file: Path = Field(
        Path(".state/cache-secret"), description="Secret of the cache keys; made at the first start, shared by workers."
    )
    files_dir: Path | None = Field(
        None,
        description="Folder of uploaded files and of batches, shared by workers and replicas; left out: `files` beside "
        "the cache secret.",
    )
    files_max_bytes: int = Field(64 * 1024 * 1024, ge=1024, description="Largest file at /v1/files; beyond it a 413.")
    files_total_bytes: int = Field(
        1024 * 1024 * 1024, ge=1024, description="All files of one owner together; beyond it a 413."
    )
    batch_concurrency: int = Field(
        4, ge=0, le=256, description="Lines of batches that one worker asks at once; 0: this one works on none."
    )
    max_body_bytes: int = Field(8 * 1024 * 1024, ge=1024, description="Largest request body; beyond it a 413.")
    body_timeout_seconds: float = Field(30, gt=0, description="Longest wait for a request's body.")
    connect_timeout_seconds: float = Field(5, gt=0, description="Longest wait for a connection to an upstream.")
    first_byte_timeout_seconds: float = Field(
        120, gt=0, description="Longest wait for the first byte of a streamed answer."
    )
    idle_timeout_seconds: float = Field(60, gt=0, description="Longest silence inside a streamed answer.")
    total_timeout_seconds: float = Field(600, gt=0, description="Longest time for one answer, streamed or not.")
    upstream_retries: int = Field(
        2, ge=0, le=10, description="How often a call that failed before its first byte is made again."
    )
    drain_timeout_seconds: int = Field(30, ge=0, description="How long running answers may go on after SIGTERM.")
    otlp_endpoint: str | None = Field(
        None,
        description="Where OpenTelemetry spans go, OTLP over HTTP (`http://127.0.0.1:4318`); wants `lab-proxy[otel]`.",
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="Form of the log on stderr; `auto`: text on a terminal, else JSON."
    )

    @field_validator("allowed_hosts", "allowed_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return (
            tuple(part.strip().lower() for part in value.split(",") if part.strip())
            if isinstance(value, str)
            else value
        )

    @field_validator("model_url", "openai_base_url")
    @classmethod
    def _http_url(cls, value: str) -> str:
        if not is_http(value) or "@" in value or "?" in value:
            raise ValueError("must be an http:// or https:// URL without a user and without a query")
        return value.rstrip("/")

    @field_validator("otlp_endpoint")
    @classmethod
    def _otlp_url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("must be an http:// or https:// URL")
        return value.rstrip("/") if value else None

    @field_validator("redis_url")
    @classmethod
    def _redis_url(cls, value: str) -> str:
        if not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must be a redis://, rediss:// or unix:// URL")
        return value

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if self.admin_key_file and self.admin_key:
            raise ValueError("PROXY_ADMIN_KEY and PROXY_ADMIN_KEY_FILE are both set: keep one")
        keys = self.keys_required
        if self.host not in LOOPBACK and not keys and not self.allow_anonymous:
            raise ValueError(
                f"PROXY_HOST={self.host} lets others in without a key and spends yours: listen on 127.0.0.1, "
                "ask for virtual keys (PROXY_ADMIN_KEY_FILE), "
                "or set PROXY_ALLOW_ANONYMOUS=true where something else guards the port"
            )
        if self.openai_api_key_file and self.openai_api_key:
            raise ValueError("PROXY_OPENAI_API_KEY and PROXY_OPENAI_API_KEY_FILE are both set: keep one")
        return self

    def openai_key(self) -> str | None:
        """The key of the OpenAI upstream, or None. Raises ValueError naming the variable when the file is no good."""
        if self.openai_api_key_file is None:
            return self.openai_api_key.get_secret_value().strip() or None if self.openai_api_key else None
        try:
            key = self.openai_api_key_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"PROXY_OPENAI_API_KEY_FILE cannot be read: {error}") from None
        return key or None

    @property
    def keys_required(self) -> bool:
        """Every caller needs a virtual key. Raises like `operator_key`."""
        return self.operator_key() is not None or self.require_keys

    def operator_key(self) -> str | None:
        """The admin key, or None. Raises ValueError naming the variable when it is weak or its file is no good."""
        name = "PROXY_ADMIN_KEY_FILE" if self.admin_key_file else "PROXY_ADMIN_KEY"
        try:
            text = self.admin_key_file.read_text() if self.admin_key_file else ""
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"PROXY_ADMIN_KEY_FILE cannot be read: {error}") from None
        key = (self.admin_key.get_secret_value() if self.admin_key else text).strip()
        if key and (why := admin_key_weakness(key)):
            raise ValueError(f"{name} is weak: {why}. `openssl rand -hex 32` makes a good one")
        return key or None

    @property
    def files_folder(self) -> Path:
        """Where uploads and batches lie."""
        return self.files_dir or self.cache_secret_file.parent / "files"

    @property
    def spool_folder(self) -> Path:
        """Where charges wait that redis does not take."""
        return self.ledger_folder or self.cache_secret_file.parent
