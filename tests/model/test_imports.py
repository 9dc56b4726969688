"""Processes that only route do not import torch: the service's main process, Serve's controller, the catalogue."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "services/model"
ROUTING = (
    "__main__",
    "cli",
    "api.http.deadline",
    "api.http.logs",
    "api.http.record",
    "api.http.service",
    "api.http.usage",
    "api.openapi",
    "models.catalogue",
    "models.fetching",
    "models.hub",
    "models.kinds",
    "models.progress",
    "models.sizes",
    "models.sources",
    "serving.activity",
    "serving.catalogue_app",
    "serving.front",
    "serving.lifecycle",
    "serving.launcher",
    "serving.ray_internals",
    "serving.replica",
    "settings",
)


@pytest.mark.parametrize("module", ROUTING)
def test_a_process_that_only_routes_imports_no_torch(module: str) -> None:
    """torch costs such a process seconds at its start and 200 MB of memory."""
    code = (
        f"import sys; sys.path.insert(0, {str(PACKAGE)!r}); import lab_model.{module}; "
        "print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_every_loader_and_path_exists() -> None:
    """The table of kinds names modules and paths as text, so that it imports nothing."""
    from importlib import import_module

    from lab_model.api.app import HANDLERS
    from lab_model.api.wire.endpoints import REQUESTS
    from lab_model.models.kinds import KINDS, PATHS

    assert set(PATHS) == set(HANDLERS) == set(REQUESTS)
    for spec in KINDS.values():
        assert callable(import_module(f"lab_model.models.{spec.loader}").load)
