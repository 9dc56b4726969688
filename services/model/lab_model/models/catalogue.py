"""The catalogue: its entries, and the arguments of one model's application.

Knows YAML and names. Knows nothing of torch, Ray, HTTP or the location of weights.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from ..errors import CatalogueError
from ..settings import otlp_endpoint
from .kinds import Kind

SCHEMES = ("wheel", "file", "hub")
ADDED = "models.yaml"  # in MODEL_FOLDER: the models that were added to the catalogue
Device = Literal["auto", "cpu", "cuda", "mps"]


class Replicas(BaseModel):
    """Ray Serve runs between min and max replicas, so that each has about `target` requests in flight."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: Annotated[int, Field(ge=1, le=64)] = 1
    max: Annotated[int, Field(ge=1, le=64)]
    target: Annotated[float, Field(gt=0)] = 16

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, more than max, {self.max}")
        return self


class Entry(BaseModel):
    """One model of the catalogue; models.yaml explains the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
    kind: Kind
    source: str
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    context: Annotated[int, Field(ge=16)] | None = None
    replicas: Annotated[int, Field(ge=1, le=64)] | Replicas = 1
    device: Device | None = None
    load: Literal["start", "demand"] = "start"
    idle_minutes: Annotated[float, Field(gt=0)] | None = None
    licence: str | None = None
    languages: tuple[str, ...] = ()

    @field_validator("source")
    @classmethod
    def _known(cls, value: str) -> str:
        scheme, _, rest = value.partition(":")
        if scheme == "modelscope":
            raise ValueError("modelscope: is not supported; give hub:<owner/name>, file:<path> or wheel:<path>")
        if scheme not in SCHEMES or not rest:
            raise ValueError(f"a source begins with {', '.join(f'{each}:' for each in SCHEMES)}")
        return value

    @property
    def most_replicas(self) -> int:
        """Largest number of replicas that run at once, without those that replace others."""
        return self.replicas.max if isinstance(self.replicas, Replicas) else self.replicas


class AppArgs(BaseModel):
    """Arguments of one model's application: its catalogue entry and the service's settings.

    otlp_endpoint: where spans are sent; by default that of the environment of the process that builds the application.
    progress_file: where its load is reported. copy_bytes: of the process of its second copy. cpus: reserved for each
    replica. log_pipe, metrics_dir: of the one machine that all replicas share. None in a cluster: there the log goes to
    stderr, and `cluster_app` asks each replica for its metrics and usage."""

    entry: Entry
    cpus: float = 0
    device: Device = "auto"
    gpus: float = 0
    threads: int = 0
    kv_tokens: int = 16384
    max_running: int = 64
    max_queued: int = 256
    default_max_tokens: int = 1024
    step_timeout_seconds: float = 300
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 1024 * 1024
    drain_timeout_seconds: float = 30
    otlp_endpoint: str | None = Field(default_factory=otlp_endpoint)
    log_format: Literal["json", "text"] = "json"
    log_pipe: Path | None = None
    metrics_dir: Path | None = None
    folder: Path | None = None
    progress_file: Path | None = None
    copy_bytes: int = 0


def load_catalogue(path: Path | None, folder: Path | None = None) -> list[Entry]:
    """The entries of `path`, or of the packaged catalogue, then those that were added in `folder`.

    Raises CatalogueError that names the faulty line. Of an id in both files the first one counts."""
    entries = read_entries(path or Path(__file__).with_name("models.yaml"))
    if not entries:
        raise CatalogueError(f"{path} contains no model")
    ids = {entry.id for entry in entries}
    return entries + [entry for entry in added_entries(folder) if entry.id not in ids]


def added_entries(folder: Path | None) -> list[Entry]:
    """The models that were added to the catalogue. Raises CatalogueError."""
    return read_entries(folder / ADDED) if folder and (folder / ADDED).exists() else []


def write_added(folder: Path, entries: Sequence[Entry]) -> None:
    """Replace the list of added models. Raises OSError."""
    rows: list[dict[str, Any]] = [entry.model_dump(mode="json", exclude_defaults=True) for entry in entries]
    part = folder / f"{ADDED}.{os.getpid()}"
    part.write_text("# Written by `make models ADD=…`.\n" + yaml.safe_dump(rows, sort_keys=False, allow_unicode=True))
    part.replace(folder / ADDED)


def read_entries(path: Path) -> list[Entry]:
    """The entries of one file. Raises CatalogueError that names the faulty line."""
    try:
        entries = TypeAdapter(list[Entry]).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CatalogueError(f"cannot read the catalogue {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise CatalogueError(f"{path} is not YAML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CatalogueError(f"{path}: entry {place or '(all)'}: {first['msg']}") from None
    ids = [entry.id for entry in entries]
    if twice := sorted({id_ for id_ in ids if ids.count(id_) > 1}):
        raise CatalogueError(f"{path} lists {', '.join(twice)} more than once")
    return entries
