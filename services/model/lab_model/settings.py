"""What the environment may say to the model service, and what each Serve application gets of it.

Nothing else in the package reads the environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from .models.catalogue import Entry


class Settings(BaseSettings):
    """Every field is the variable `MODEL_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="MODEL_", env_ignore_empty=True, extra="ignore")

    host: str = Field("127.0.0.1", description="Address the service listens on.")
    port: int = Field(8000, ge=1, le=65535, description="Port the service listens on.")
    catalogue_file: Path | None = Field(
        None, description="YAML list of the models to serve; left out: the two embedded models."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where models run. `cuda` without a CUDA device stops the start; `auto` takes one if there."
    )
    threads: int = Field(
        0, ge=0, le=1024, description="torch's threads in each replica; 0: one per core of the cgroup."
    )
    kv_tokens: int = Field(
        16384, ge=256, description="KV cache of each chat model in tokens, shared by all its running requests."
    )
    max_running: int = Field(64, ge=1, le=1024, description="Requests that one chat model works on at once.")
    max_queued: int = Field(256, ge=0, le=65536, description="Requests that wait for one chat model before a 429.")
    default_max_tokens: int = Field(
        1024, ge=1, description="Longest answer of a request that sets no `max_tokens` (the context may leave less)."
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Host names callers may use beside `localhost`, `model` and addresses; `*` for any. "
        "Guards against rebinding.",
    )
    max_body_bytes: int = Field(8 * 1024 * 1024, ge=1024, description="Largest request body; beyond it a 413.")
    ray_dir: Path | None = Field(
        None, description="Folder for Ray's session (short path: it holds sockets); left out: a temporary one."
    )
    start_timeout_seconds: float = Field(
        600, gt=0, description="A model that is not loaded by then ends the service with an error."
    )
    drain_timeout_seconds: float = Field(30, ge=0, description="How long running requests may go on after SIGTERM.")
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="Form of the log on stderr; `auto`: text on a terminal, else JSON."
    )

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(part.strip().lower() for part in value.split(",") if part.strip())


class AppArgs(BaseModel):
    """What one model's application is built from: its catalogue entry and the service's settings."""

    entry: Entry
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus: float = 0
    threads: int = 0
    kv_tokens: int = 16384
    max_running: int = 64
    max_queued: int = 256
    default_max_tokens: int = 1024
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 1024 * 1024
    drain_timeout_seconds: float = 30
    log_format: Literal["json", "text"] = "json"
    log_pipe: Path
    metrics_dir: Path


class CatalogueArgs(BaseModel):
    """What the catalogue's application is built from. address: where Serve's HTTP proxy listens, http://127.0.0.1:8000."""

    entries: list[Entry]
    address: str
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 1024 * 1024
    drain_timeout_seconds: float = 30
    log_format: Literal["json", "text"] = "json"
    log_pipe: Path
    metrics_dir: Path
