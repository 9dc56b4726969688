"""Loads the model of one catalogue entry into this process.

Knows which module loads which kind, and logs the load. Knows nothing of Ray or of a kind's details.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from safetensors import SafetensorError

from ..api.http.logs import start_logging
from ..errors import CatalogueError
from ..host import cores
from ..weights.headers import GGUFError, SafetensorsError
from .catalogue import AppArgs, Entry
from .kinds import KINDS, Loaded
from .memory import detach, pick_device, release_memory
from .progress import Progress
from .sizes import read_json
from .sources import Source, resolve_source

log = logging.getLogger(__name__)


def load(args: AppArgs) -> Loaded:
    """The application of one catalogue entry. Raises CatalogueError when its weights are missing or cannot run here."""
    # Imported in this thread, which does not end, because libraries may start things that belong to it.
    loader = import_module(f".{KINDS[args.entry.kind].loader}", __package__)
    return detach(lambda: _load(args, loader))


def _load(args: AppArgs, loader: Any) -> Loaded:
    start_logging(args.log_format, args.log_pipe)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    entry, progress = args.entry, Progress(args.progress_file)
    transformers.logging.set_tqdm_hook(lambda _, parts, facts: Bar(progress, *parts, **facts))
    started, before = time.monotonic(), psutil.Process().memory_info().rss
    torch.set_num_threads(args.threads or cores())
    device = pick_device(entry.device or args.device)
    info: dict[str, Any] = {"id": entry.id, "kind": entry.kind, "device": str(device)}
    source = resolve_source(entry, args.folder)
    refuse_own_code(entry, source)
    try:
        app, more, is_alive = loader.load(args, source, device)
    except OSError as error:
        raise CatalogueError(f"{entry.id}: files are missing ({entry.source}): {_line(error)}") from None
    except (GGUFError, SafetensorsError, SafetensorError) as error:
        raise CatalogueError(f"{entry.id}: {error}") from None
    except CatalogueError as error:
        raise CatalogueError(f"{entry.id}: {str(error).removeprefix(f'{entry.id}: ')}") from None
    except (ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:  # transformers', of wrong files
        log.exception("%s cannot be loaded", entry.id)
        raise CatalogueError(f"{entry.id}: {type(error).__name__}: {_line(error)}") from None
    release_memory()
    rss = psutil.Process().memory_info().rss
    info |= {"engine": f"torch {torch.__version__}", "seconds": round(time.monotonic() - started, 1)} | more
    log.info("loaded", extra={"fields": info | {"rss_bytes": rss, "rss_before_bytes": before}})
    return Loaded(app, info, is_alive)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


class Bar:
    """Replaces a progress bar of transformers: reports the share of its iteration that is done."""

    def __init__(self, progress: Progress, iterable: Iterable[Any] = (), *, total: int | None = None, **_: Any) -> None:
        self._progress, self._iterable = progress, iterable
        self._total = total or (len(iterable) if isinstance(iterable, Sized) else 0)
        self._done = 0

    def __iter__(self) -> Iterator[Any]:
        for each in self._iterable:
            yield each
            self.update()

    def update(self, by: int = 1) -> None:
        self._done += by
        if self._total:
            self._progress.report("weights", self._done / self._total)

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_, **__: None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def refuse_own_code(entry: Entry, source: Source) -> None:
    """Raises CatalogueError for a model that needs Python code from its repository, which is never run."""
    config = Path(source.folder) / "config.json"
    if source.gguf_file or not config.exists():
        return
    values = read_json(config)
    if values.get("model_type") not in transformers.CONFIG_MAPPING:
        own = "needs Python code of its own (trust_remote_code), which is never run" if "auto_map" in values else (
            "has an architecture that transformers does not know"
        )  # fmt: skip
        raise CatalogueError(f"{entry.id}: the model {own}: model_type {values.get('model_type')}")
