"""Ray's private interfaces are those that serving/ray_internals.py was checked against."""

from __future__ import annotations

import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import lab_model
from lab_model.serving.ray_internals import CHECKED_RAY

WHAT_TO_CHECK = f"""Ray {version("ray")} is installed, and serving/ray_internals.py was checked against {CHECKED_RAY}.
Check against the new version, then set CHECKED_RAY:
1. ray._private.worker._global_node has kill_log_monitor and kill_monitor, and Ray works without both processes.
2. ray.serve.context._get_global_client()._controller has get_target_groups; its groups have app_name, its targets port.
3. @serve.ingress() without an application calls __serve_build_asgi_app__, also that of a base class.
4. Ray still reads each RAY_ variable of prepare_environment, under this name.
5. ray.init still takes _temp_dir.
6. Serve adds 5 s to RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S (tests/model/test_front.py measures the drain).
7. Serve calls what RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names, and decodes the headers of DECODED_HEADERS alone.
8. `ray drain-node` still calls GcsClient.drain_node with node id, reason, message and deadline.
9. ray.serve.context._get_global_client() has deploy_apps, which takes a ServeDeploySchema.
10. An idle service takes no more of a core than with {CHECKED_RAY}."""


def ray_source(path: str) -> str:
    """Text of a file of the installed Ray; importing it would start half of Ray."""
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / path).read_text(encoding="utf-8")


def test_ray_is_the_version_that_was_checked() -> None:
    assert version("ray").split(".")[:2] == CHECKED_RAY.split("."), WHAT_TO_CHECK


def test_the_private_names_exist() -> None:
    """Everything that can be seen without starting Ray."""
    for path, name in (
        ("_private/worker.py", "_global_node"),
        ("_private/worker.py", "_temp_dir"),
        ("_private/node.py", "def kill_log_monitor(self, check_alive"),
        ("_private/node.py", "def kill_monitor(self, check_alive"),
        ("serve/context.py", "def _get_global_client("),
        ("serve/_private/client.py", "def deploy_apps("),
        ("serve/_private/controller.py", "def get_target_groups("),
        ("serve/api.py", "__serve_build_asgi_app__"),
        ("scripts/scripts.py", "gcs_client = ray._raylet.GcsClient(address=address)"),
        ("scripts/scripts.py", "gcs_client.drain_node("),
    ):
        assert name in ray_source(path), f"{name} is not in ray/{path} any more"
    ours = (Path(lab_model.__file__).parent / "serving/ray_internals.py").read_text(encoding="utf-8")
    constants = ray_source("serve/_private/constants.py")
    names = set(re.findall(r'"(RAY_SERVE_\w+)"', ours))
    assert len(names) > 4
    assert not {name for name in names if name not in constants}


def test_no_other_file_uses_rays_private_interfaces() -> None:
    private = re.compile(r"ray\._private|ray\.serve\._private|_get_global_client|_temp_dir|__serve_|\"RAY_\w+\"")
    files = [
        path.name
        for path in sorted(Path(lab_model.__file__).parent.rglob("*.py"))
        if private.search(path.read_text(encoding="utf-8"))
    ]
    assert files == ["ray_internals.py"]
