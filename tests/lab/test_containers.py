"""What the containers are given: compose files, health checks, the gate's configuration. Needs no container engine."""

from __future__ import annotations

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import lab_load.settings
import lab_model.settings
import lab_proxy.settings
import lab_ui.settings
import pytest
import yaml
from lab_model.serving.front import haproxy_binary
from processes import free_port, process
from pydantic_settings import BaseSettings

ROOT = Path(__file__).resolve().parents[2]
SETTINGS: dict[str, type[BaseSettings]] = {
    "ui": lab_ui.settings.Settings,
    "proxy": lab_proxy.settings.Settings,
    "model": lab_model.settings.Settings,
    "load": lab_load.settings.Settings,
}
# Addresses and folders, which the images set, and keys, which are files.
NOT_GIVEN = {
    "ui": {"UI_HOST", "UI_PORT", "UI_FINDINGS_FILE"},
    "proxy": {"PROXY_HOST", "PROXY_PORT", "PROXY_CACHE_SECRET_FILE", "PROXY_OPENAI_API_KEY", "PROXY_ADMIN_KEY"},
    "model": {"MODEL_HOST", "MODEL_PORT"},
    "load": {"LOAD_PORT", "LOAD_API_PORT", "LOAD_WEB_HOST", "LOAD_RUNS_DIR", "LOAD_ADMIN_KEY"},
}
STARTED = {"ui": 8501, "proxy": 8080, "model": None, "redis": None, "load": 8090}  # by `make up` -> published port


class ComposeLoader(yaml.SafeLoader):
    """YAML with compose's own tags."""


ComposeLoader.add_constructor("!reset", lambda _loader, _node: None)


def services(name: str = "compose.yaml") -> dict[str, Any]:
    found: dict[str, Any] = yaml.load((ROOT / name).read_text(), ComposeLoader)["services"]  # noqa: S506 - safe, too
    return found


@pytest.mark.parametrize("service", SETTINGS)
def test_every_setting_can_be_given_to_its_container(service: str) -> None:
    """From the environment or compose's `.env`; a variable that is no setting would have no effect."""
    prefix = f"{service.upper()}_"
    fields = {f"{prefix}{name.upper()}" for name in SETTINGS[service].model_fields}
    given = {name for name in services()[service]["environment"] if name.startswith(prefix)}
    assert given == fields - NOT_GIVEN[service]
    for layer in ROOT.glob("compose.*.yaml"):
        layered = services(layer.name).get(service, {}).get("environment", {})
        assert {name for name in layered if name.startswith(prefix)} <= fields


def test_make_up_starts_these_and_publishes_on_loopback() -> None:
    """Services without a profile. The ui knows the load service by the port that it listens on."""
    started = {name: service for name, service in services().items() if "profiles" not in service}
    assert set(started) == set(STARTED)
    for name, port in STARTED.items():
        published = [f"127.0.0.1:${{{name.upper()}{'_API' * (name == 'load')}_PORT:-{port}}}:{port}"] if port else []
        assert started[name].get("ports", []) == published
    assert started["ui"]["environment"]["UI_LOAD_URL"] == "${UI_LOAD_URL:-http://load:8090}"
    assert lab_load.settings.Settings.model_fields["api_port"].default == STARTED["load"]


def test_behind_the_gate_no_caller_goes_past_it() -> None:
    """compose.scale.yaml: ui and load ask the gate, whose name the proxies take."""
    layer = services("compose.scale.yaml")
    assert layer["ui"]["environment"]["UI_PROXY_URL"] == "${UI_PROXY_URL:-http://gate:8080}"
    assert layer["load"]["environment"]["LOAD_HOST"] == "${LOAD_HOST:-http://gate:8080}"
    assert layer["proxy"]["environment"]["PROXY_ALLOWED_HOSTS"].split(",")[0] == "gate"
    assert {name for name in layer if "gate" in layer[name].get("depends_on", {})} == {"ui", "load"}


def test_the_nodes_of_a_cluster_have_what_kubernetes_gives_them() -> None:
    """compose.cluster.yaml: Ray's variables are those of the ConfigMap `ray`, and no node may write to the weights."""
    manifest = yaml.safe_load((ROOT / "k8s/model/rayservice/kustomization.yaml").read_text())
    (ray,) = (each["literals"] for each in manifest["configMapGenerator"] if each["name"] == "ray")
    image = {"HF_HUB_OFFLINE", "HOME"}  # set by the image
    wanted = {name: value for name, _, value in (each.partition("=") for each in ray) if name not in image}
    layer = services("compose.cluster.yaml")
    for node in ("model", "worker"):
        given = layer[node]["environment"]
        assert given | wanted == given
        assert given["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")
        assert [volume["read_only"] for volume in layer[node]["volumes"]] == [True]
    assert "--num-cpus=0" in layer["model"]["command"][0]


def test_selinux_lets_containers_read_what_is_mounted() -> None:
    binds = [
        volume
        for service in services().values()
        for volume in service.get("volumes", [])
        if not isinstance(volume, str) or volume.startswith((".", "/", "$"))
    ]
    assert len(binds) >= 3
    for bind in binds:
        if isinstance(bind, str):
            assert bind.endswith(":ro,z")
            continue
        assert bind["bind"] == {"create_host_path": False, "selinux": "z"}
        assert Path(ROOT / re.sub(r"\$\{\w+:-(.*)\}", r"\1", bind["source"])).is_file()


DOCKERFILES = sorted([*ROOT.glob("services/*/Dockerfile"), ROOT / "load/Dockerfile"])


@contextmanager
def answering(status: int) -> Iterator[int]:
    """The port of a server that answers each GET with `status`."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.parent.name)
def test_a_health_check_asks_the_service_itself(dockerfile: Path) -> None:
    """Healthy at 200, not otherwise, whatever forward proxy the engine puts into the environment."""
    found = re.search(r"^HEALTHCHECK .*\\\n\s+CMD (\[.+\])$", dockerfile.read_text(), re.M)
    assert found
    _, option, code = json.loads(found[1])
    environ = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    environ |= {"http_proxy": f"http://127.0.0.1:{free_port()}"}
    for status in (200, 503):
        with answering(status) as port:
            own, count = re.subn(r"127\.0\.0\.1', \d+", f"127.0.0.1', {port}", code)
            assert count == 1
            done = subprocess.run([sys.executable, option, own], env=environ, capture_output=True, check=False)
        assert done.returncode == (status != 200), done.stderr.decode()


# -- the Makefile, with a program in docker's place that shows what it is given


NOT_OURS = ("GPU", "CLUSTER", "WORKERS", "RAY_", "ARGS", "MAKE", "MFLAGS")


def made(folder: Path, *arguments: str, **environ: str) -> list[str]:
    docker = folder / "docker"
    docker.write_text('#!/bin/sh\necho "base=$MODEL_BASE_IMAGE"\nfor each; do echo "argument=$each"; done\n')
    docker.chmod(0o755)
    own = {name: value for name, value in os.environ.items() if not name.startswith(NOT_OURS)}
    own |= {"PATH": f"{folder}:{os.environ['PATH']}"} | environ
    done = subprocess.run(["make", *arguments], cwd=ROOT, env=own, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(("gpu", "on"), [(None, False), ("0", False), ("", False), ("1", True)])
def test_only_gpu_1_takes_the_gpu(tmp_path: Path, gpu: str | None, on: bool) -> None:
    """From the environment and from make's own command line."""
    ways = [made(tmp_path, "up", f"GPU={gpu}"), made(tmp_path, "up", GPU=gpu)] if gpu is not None else []
    for lines in ways or [made(tmp_path, "up")]:
        assert ("argument=compose.gpu.yaml" in lines) == on
        assert ("base=python:3.11-slim-bookworm" in lines) != on


def test_cluster_1_adds_its_layers_and_a_token(tmp_path: Path) -> None:
    """The token is in the environment of compose; another number of workers is its option."""
    lines = made(tmp_path, "up", CLUSTER="1", WORKERS="3", RAY_AUTH_TOKEN="t")
    files = [lines[at + 1] for at, line in enumerate(lines[:-1]) if line == "argument=-f"]
    assert files == [f"argument={name}" for name in ("compose.yaml", "compose.scale.yaml", "compose.cluster.yaml")]
    assert "argument=worker=3" in lines
    assert "argument=compose.cluster.yaml" not in made(tmp_path, "up", CLUSTER="0")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        made(tmp_path, "up", CLUSTER="1", GPU="1")
    assert "exclude each other" in caught.value.stderr


def test_quotes_in_args_are_the_shell_s(tmp_path: Path) -> None:
    lines = made(tmp_path, "down", """ARGS=--project-name "a 'b' c" """)
    assert lines[-2:] == ["argument=--project-name", "argument=a 'b' c"]


# -- the gate


class Deaf:
    """A proxy that closes every connection when it has read the request's head; counts requests by method."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                head = connection.recv(65536).decode()
                if " /health " in head:
                    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                elif head:
                    self.asked[head.split(" ")[0]] += 1

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def deaf() -> Iterator[Deaf]:
    proxy = Deaf()
    yield proxy
    proxy.close()


def test_the_gate_sends_a_request_that_changes_something_once(deaf: Deaf, tmp_path: Path) -> None:
    """A proxy that answers nothing may have called a paid upstream. One that refuses the connection has not."""
    binary = haproxy_binary()
    if binary is None:
        pytest.skip("HAProxy is not here")
    port = free_port()
    text = (ROOT / "services/gate/haproxy.cfg").read_text()
    text = re.sub(r"^resolvers docker\n(?:    .*\n)+", "", text, flags=re.M)
    text = text.replace("bind :8080", f"bind 127.0.0.1:{port}")
    # Without health checks: the refusing one counts as up, as in the second before the check notices.
    servers = f"server refusing 127.0.0.1:{free_port()}\n    server deaf 127.0.0.1:{deaf.port}"
    text, count = re.subn(r"server-template .*", servers, text)
    assert count == 1
    (tmp_path / "gate.cfg").write_text(text)
    with process("gate", [binary, "-db", "-f", tmp_path / "gate.cfg"], port=port, log_dir=tmp_path, ready="/gate"):
        for _ in range(2):  # each server is the first choice once
            answer = httpx2.post(f"http://127.0.0.1:{port}/v1/chat/completions", json={})
            assert answer.status_code == 502
            assert answer.json()["error"]["code"] == "proxy_unavailable"
        assert deaf.asked == {"POST": 2}
        httpx2.get(f"http://127.0.0.1:{port}/v1/models")
        assert deaf.asked["GET"] > 1
