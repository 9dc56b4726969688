"""Loads the model of one catalogue entry into this process.

Knows which module loads which kind, and what is logged of it. Knows nothing of Ray or of a kind's details.
"""

from __future__ import annotations

import logging
import time
from importlib import import_module
from typing import Any

import psutil
import torch
import transformers

from ..api.http.logs import start_logging
from ..errors import CatalogueError
from ..host import cores
from ..weights.gguf import GGUFError
from .catalogue import AppArgs
from .kinds import KINDS, Loaded
from .memory import detach, pick_device, release_memory
from .sources import resolve_source

log = logging.getLogger(__name__)


def load(args: AppArgs) -> Loaded:
    """The application of one catalogue entry. Raises CatalogueError when its weights are missing or cannot run here."""
    # Imported in this thread, which stays: libraries may keep what they start.
    loader = import_module(f".{KINDS[args.entry.kind].loader}", __package__)
    return detach(lambda: _load(args, loader))


def _load(args: AppArgs, loader: Any) -> Loaded:
    start_logging(args.log_format, args.log_pipe)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    entry = args.entry
    started, before = time.monotonic(), psutil.Process().memory_info().rss
    torch.set_num_threads(args.threads or cores())
    device = pick_device(entry.device or args.device)
    info: dict[str, Any] = {"id": entry.id, "kind": entry.kind, "device": str(device)}
    source = resolve_source(entry)
    try:
        app, more, is_alive = loader.load(args, source, device)
    except OSError as error:
        raise CatalogueError(f"{entry.id}: files are missing ({entry.source}): {str(error).splitlines()[0]}") from None
    except GGUFError as error:
        raise CatalogueError(f"{entry.id}: {error}") from None
    release_memory()
    rss = psutil.Process().memory_info().rss
    info |= more
    grown = {"rss_bytes": rss, "rss_before_bytes": before, "seconds": round(time.monotonic() - started, 1)}
    log.info("loaded", extra={"fields": info | grown})
    return Loaded(app, info, is_alive)
