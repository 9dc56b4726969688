"""Settings of the ui, from environment variables. No other module of the package reads the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from .traces import installed

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Settings(BaseSettings):
    """Each field is the environment variable `UI_<NAME>`. Lists are separated by commas, times are in seconds."""

    model_config = SettingsConfigDict(env_prefix="UI_", env_ignore_empty=True, extra="ignore")

    host: str = Field(default="127.0.0.1", description="Address the ui listens on.")
    port: int = Field(default=8501, ge=1, le=65535, description="Port the ui listens on.")
    allow_anonymous: bool = Field(
        default=False,
        description="Permit a `UI_HOST` beyond loopback. The ui has no password, so without this the start fails.",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Host names that browsers may use, besides loopback and `ui`; `*`: any. Prevents DNS rebinding.",
    )
    proxy_url: str = Field(default="http://127.0.0.1:8080", description="Base URL of the proxy, as the ui reaches it.")
    public_proxy_url: str | None = Field(
        default=None,
        description="Base URL of the proxy that readers use, shown in “Show the code”. Default: `UI_PROXY_URL`.",
    )
    load_url: str = Field(
        default="http://127.0.0.1:8090", description="Base URL of the load service's API, as the ui reaches it."
    )
    api_key: SecretStr | None = Field(
        default=None,
        description="Key for the proxy that all readers share. A key that a reader enters in the sidebar overrides it.",
    )
    language: Literal["auto", "en", "ko"] = Field(
        default="auto",
        description="Language of the pages; `auto`: the browser's. `?lang=` and the switch in the sidebar override it.",
    )
    connect_timeout_seconds: float = Field(default=2, gt=0, le=60, description="Timeout for a connection to the proxy.")
    answer_timeout_seconds: float = Field(
        default=150, gt=0, description="Longest time without data from the proxy, before or during an answer."
    )
    status_timeout_seconds: float = Field(
        default=2, gt=0, le=30, description="Longest wait for the proxy's status and list of models."
    )
    findings_file: Path | None = Field(
        default=None, description="The doctor's findings, which `make lab` writes. In containers there is none."
    )
    refresh_seconds: float = Field(default=5, ge=1, le=3600, description="How often the status page asks again.")

    otlp_endpoint: str | None = Field(
        default=None,
        validate_default=True,
        description="OTLP/HTTP endpoint for OpenTelemetry traces (`http://127.0.0.1:4318`); needs `lab-ui[otel]`. "
        "Default: `OTEL_EXPORTER_OTLP_ENDPOINT`.",
    )

    @field_validator("otlp_endpoint")
    @classmethod
    def _traced(cls, value: str | None) -> str | None:
        value = value or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        if not value:
            return None
        if not value.startswith(("http://", "https://")):
            raise ValueError("must be an http:// or https:// URL")
        if not installed():
            raise ValueError("needs the OpenTelemetry packages: pip install 'lab-ui[otel]'")
        return value.rstrip("/")

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return (
            tuple(part.strip().lower() for part in value.split(",") if part.strip())
            if isinstance(value, str)
            else value
        )

    @field_validator("api_key")
    @classmethod
    def _printable(cls, value: SecretStr | None) -> SecretStr | None:
        text = value.get_secret_value() if value else "-"
        if not text.isascii() or not text.isprintable() or " " in text:
            raise ValueError("must be printable ASCII without spaces")
        return value

    @field_validator("proxy_url", "public_proxy_url", "load_url")
    @classmethod
    def _http_url(cls, value: str | None) -> str | None:
        if value is not None and (not value.startswith(("http://", "https://")) or "@" in value or "?" in value):
            raise ValueError("must be an http:// or https:// URL without a user and without a query")
        return value and value.rstrip("/")

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if self.host not in LOOPBACK and not self.allow_anonymous:
            raise ValueError(
                f"UI_HOST={self.host} lets others use the proxy with your key and without a password: listen on "
                "127.0.0.1, or set UI_ALLOW_ANONYMOUS=true if readers enter their own keys or the port is protected"
            )
        return self

    @property
    def shown_proxy_url(self) -> str:
        """Base URL of the proxy in “Show the code”."""
        return self.public_proxy_url or self.proxy_url
