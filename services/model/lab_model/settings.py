"""The service's settings, from the environment. No other module reads MODEL_ variables."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """Each field is the environment variable `MODEL_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="MODEL_", env_ignore_empty=True, extra="ignore")

    host: str = Field("127.0.0.1", description="Address the service listens on.")
    port: int = Field(8000, ge=1, le=65535, description="Port the service listens on.")
    catalogue_file: Path | None = Field(
        None, description="YAML list of the models to serve. Default: the two embedded models."
    )
    folder: Path | None = Field(
        None,
        description="Folder for added models, their list, and digests of files. Default: none; models cannot be added.",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto",
        description="Device of the models. `auto`: a CUDA device if there is one; `cuda`: the start fails without one; "
        "`mps`: Apple's GPUs.",
    )
    memory_bytes: int = Field(
        0,
        ge=0,
        description="Memory of the whole service. The models share it, less Ray's part; if it is short, the least "
        "recently used model is unloaded. 0: most of the memory that is free at the start.",
    )
    load_wait_seconds: float = Field(
        120,
        ge=0,
        description="How long a request waits for a model that is being loaded before a 503 tells how far it is.",
    )
    threads: int = Field(
        0, ge=0, le=1024, description="torch's threads in each replica; 0: one per core of the cgroup."
    )
    replica_cpus: float = Field(
        1, gt=0, le=1024, description="CPUs that Ray reserves for each replica in a cluster (`serving.deploy`)."
    )
    kv_tokens: int = Field(
        16384, ge=256, description="KV cache of each chat model in tokens, shared by all its running requests."
    )
    max_running: int = Field(64, ge=1, le=1024, description="Requests that one chat model runs at once.")
    max_queued: int = Field(256, ge=0, le=65536, description="Requests that wait for one chat model before a 429.")
    default_max_tokens: int = Field(
        1024, ge=1, description="Longest answer to a request without `max_tokens` (the context may allow less)."
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Host names that callers may use, besides `localhost`, `model` and IP addresses; `*`: any. "
        "Prevents DNS rebinding.",
    )
    max_body_bytes: int = Field(8 * 1024 * 1024, ge=1024, description="Largest request body; a larger one gets a 413.")
    ray_dir: Path | None = Field(
        None, description="Folder for Ray's session; its path must be short (sockets). Default: a temporary folder."
    )
    start_timeout_seconds: float = Field(
        600, gt=0, description="A model that is not loaded within this time counts as failed."
    )
    step_timeout_seconds: float = Field(
        300,
        gt=0,
        description="A step of a model that takes longer counts as hanging: its requests fail, and the model is loaded "
        "again. A step computes up to 512 tokens of prompts; an encoder's step up to 1,024 tokens of inputs.",
    )
    drain_timeout_seconds: float = Field(30, ge=0, description="Time for running requests to finish after SIGTERM.")
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="Format of the log on stderr; `auto`: text on a terminal, else JSON."
    )

    otlp_endpoint: str | None = Field(
        None,
        validate_default=True,
        description="OTLP/HTTP endpoint for OpenTelemetry traces (`http://127.0.0.1:4318`); needs `lab-model[otel]`. "
        "Default: `OTEL_EXPORTER_OTLP_ENDPOINT`.",
    )

    @field_validator("otlp_endpoint")
    @classmethod
    def _traced(cls, value: str | None) -> str | None:
        value = value or otlp_endpoint()
        if value is None:
            return None
        if not value.startswith(("http://", "https://")):
            raise ValueError("must be an http:// or https:// URL")
        if not _has_opentelemetry():
            raise ValueError("needs the OpenTelemetry packages: pip install 'lab-model[otel]'")
        return value.rstrip("/")

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(part.strip().lower() for part in value.split(",") if part.strip())


def _has_opentelemetry() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


def otlp_endpoint() -> str | None:
    """The standard variable of OpenTelemetry; None where it is not set."""
    return os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").rstrip("/") or None


def wrong_settings(error: ValidationError) -> list[str]:
    """A line for each wrong setting, which names its variable."""
    return [f"MODEL_{'_'.join(str(part) for part in fault['loc']).upper()}: {fault['msg']}" for fault in error.errors()]
