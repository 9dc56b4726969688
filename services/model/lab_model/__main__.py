"""Runs the model service on this machine: `python -m lab_model`."""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

from pydantic import ValidationError

from .errors import CatalogueError
from .models.catalogue import load_catalogue
from .serving.front import haproxy_binary
from .serving.launcher import FAILED, WRONG_SETTING, run, say, stop_on_signals
from .serving.ray_internals import prepare_environment
from .settings import Settings, wrong_settings


def main() -> int:
    """Check settings, catalogue and port; then serve. Returns the exit code: 2 for a wrong setting, 1 for a
    failure."""
    try:
        settings = Settings()
        load_catalogue(settings.catalogue_file, settings.folder)
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((settings.host, settings.port))
    except ValidationError as error:
        for line in wrong_settings(error):
            say(line)
        return WRONG_SETTING
    except CatalogueError as error:
        say(str(error))
        return WRONG_SETTING
    except OSError as error:
        say(f"cannot listen on {settings.host}:{settings.port} (MODEL_HOST, MODEL_PORT): {error.strerror}")
        return FAILED
    ended = threading.Event()
    stop_on_signals(ended)
    # Ray's folder contains sockets, whose paths may not exceed 107 bytes, so it is not inside the repository.
    folder = settings.ray_dir or Path(tempfile.mkdtemp(prefix="lab-ray-"))
    haproxy = haproxy_binary()
    if haproxy is None:
        say("HAProxy was not found (on Linux ray[serve] has it): Serve's own HTTP process answers, which is slower")
    prepare_environment(direct=haproxy is not None)
    try:
        return run(settings, folder, ended, haproxy)
    finally:
        for _ in range(20 if settings.ray_dir is None else 0):  # Ray's last processes may still write
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
