"""The catalogue: its entries, and what one model's application is built from.

Knows YAML and names. Knows nothing of torch, Ray, HTTP or where weights lie.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from ..errors import CatalogueError
from .kinds import Kind


class Entry(BaseModel):
    """One model of the catalogue; models.yaml explains the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
    kind: Kind
    source: Annotated[str, StringConstraints(pattern=r"^(wheel|file|hub):.+$")]
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    context: Annotated[int, Field(ge=16)] | None = None
    replicas: Annotated[int, Field(ge=1, le=64)] = 1
    device: Literal["auto", "cpu", "cuda"] | None = None


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


def load_catalogue(path: Path | None) -> list[Entry]:
    """The entries of `path`, or of the packaged catalogue. Raises CatalogueError that names the faulty line."""
    path = path or Path(__file__).with_name("models.yaml")
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
    if not entries:
        raise CatalogueError(f"{path} lists no model")
    ids = [entry.id for entry in entries]
    if twice := sorted({id_ for id_ in ids if ids.count(id_) > 1}):
        raise CatalogueError(f"{path} lists {', '.join(twice)} more than once")
    return entries
