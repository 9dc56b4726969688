"""The lab in containers for test_stack.py: a clean copy of the working tree, and Docker's own view of what it started.

Knows compose, containers and networks; knows nothing of what the services answer.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import httpx2
import pytest
import tiny
import yaml
from docker.models.containers import Container
from processes import SHOWN_ON_FAILURE, free_port

ROOT = Path(__file__).parents[2]
BASE = "python:3.11-slim-bookworm"
# Waits for a state are bounded so that a test ends, not so that it measures.
GENEROUS_SECONDS = 240.0
TINY_LAYER = {"services": {name: {"volumes": ["./tiny:/tiny:ro"]} for name in ("model", "weights")}}


def clone(into: Path) -> Path:
    """What a clone of the working tree would hold: every file that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, timeout=30,
    ).stdout.decode()  # fmt: skip
    for name in filter(None, listed.split("\0")):
        source, copy = ROOT / name, into / name
        if source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
    return into


@dataclass
class Stack:
    """One lab in containers, apart from any other on this machine by project name, image tag and ports."""

    root: Path
    engine: docker.DockerClient = field(repr=False)
    project: str
    proxy_port: int = field(default_factory=free_port)
    ui_port: int = field(default_factory=free_port)
    load_port: int = field(default_factory=free_port)
    layers: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    http: httpx2.Client = field(
        # No connection outlives its answer: the tests stop what it leads to.
        default_factory=lambda: httpx2.Client(
            timeout=120, limits=httpx2.Limits(max_keepalive_connections=0), event_hooks=SHOWN_ON_FAILURE
        ),
        repr=False,
    )

    @property
    def proxy_url(self) -> str:
        return f"http://127.0.0.1:{self.proxy_port}"

    @property
    def ui_url(self) -> str:
        return f"http://127.0.0.1:{self.ui_port}"

    @property
    def environ(self) -> dict[str, str]:
        own = {
            "COMPOSE_PROJECT_NAME": self.project,
            "COMPOSE_ANSI": "never",
            "BUILDKIT_PROGRESS": "plain",
            "LAB_TAG": self.project,
            "PROXY_PORT": str(self.proxy_port),
            "UI_PORT": str(self.ui_port),
            "LOAD_API_PORT": str(self.load_port),
        }
        # Neither this lab's settings nor the flags of a make that runs the tests.
        ours = (
            "UI_",
            "PROXY_",
            "MODEL_",
            "LOAD_",
            "LAB_",
            "COMPOSE_",
            "OPENAI_",
            "TORCH_",
            "GPU",
            "ARGS",
            "MAKE",
            "MFLAGS",
            "BUILDKIT_",
        )
        return {k: v for k, v in os.environ.items() if not k.startswith(ours)} | own | self.variables

    def run(self, *argv: str, timeout: float, given: str | None = None) -> str:
        """A command in the clone; what it said. Fails with the end of that when it fails or takes too long."""
        # Its output goes to a file: a pipe would be held open by what the command leaves running.
        log = self.root / "command.log"
        with log.open("w") as out:
            try:
                code = subprocess.run(
                    argv, cwd=self.root, env=self.environ, stdout=out, stderr=subprocess.STDOUT, timeout=timeout,
                    check=False, input=given, text=True,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                code = None
        said = log.read_text(errors="replace")
        what = f"took over {timeout:.0f} s" if code is None else f"ended with {code}"
        assert code == 0, f"{' '.join(argv)} {what}:\n{tail(said)}\n{self.logs() if 'up' in argv else ''}"
        return said

    def compose(self, *argv: str, timeout: float = 120) -> str:
        files = ("compose.yaml", "compose.override.yaml", *self.layers)
        return self.run("docker", "compose", *(f"--file={name}" for name in files), *argv, timeout=timeout)

    def containers(self, service: str | None = None) -> list[Container]:
        labels = [f"com.docker.compose.project={self.project}"]
        labels += [f"com.docker.compose.service={service}"] if service else []
        return list(self.engine.containers.list(all=True, filters={"label": labels}))

    def container(self, service: str) -> Container:
        (one,) = self.containers(service)
        return one

    def network(self, name: str) -> str:
        return f"{self.project}_{name}"

    def address(self, service: str, network: str) -> str:
        networks = self.container(service).attrs["NetworkSettings"]["Networks"]
        return str(networks[self.network(network)]["IPAddress"])

    def inside(self, service: str, *argv: str) -> tuple[int, str]:
        """A command in the running container, as its own user: exit code and output."""
        done = self.container(service).exec_run(list(argv))
        return done.exit_code, done.output.decode(errors="replace")

    def kill(self, service: str) -> None:
        """SIGKILL to the service's own process, by itself: Docker sees a crash, not an operator's stop."""
        script = "kill -9 $(cd /proc && ls -d [0-9]* | sort -n | sed -n 2p)"  # 1 is Docker's init
        self.inside(service, "bash", "-c", script)

    def restarts(self, service: str) -> int:
        return int(self.container(service).attrs["RestartCount"])

    def health(self, service: str) -> str:
        states = [each.attrs["State"].get("Health", {}).get("Status", "none") for each in self.containers(service)]
        return states[0] if len(set(states)) == 1 else ", ".join(states)

    def logs(self, lines: int = 15) -> str:
        found = [
            f"--- {one.name} ({one.status})\n{one.logs(tail=lines).decode(errors='replace')}"
            for one in self.containers()
        ]
        return "\n".join(found)

    def left(self) -> list[str]:
        """Everything in Docker that carries the project's name."""
        ours = {"filters": {"label": f"com.docker.compose.project={self.project}"}}
        found = [*self.containers(), *self.engine.networks.list(**ours), *self.engine.volumes.list(**ours)]
        return [str(each.name) for each in found]


@contextmanager
def stack_in(folder: Path) -> Iterator[Stack]:
    """A clone with a tiny model beside the embedded ones; not started. Nothing of it is left afterwards."""
    with cloned(folder) as stack:
        write_tiny(stack.root / "tiny")
        entries = yaml.safe_load((stack.root / "services/model/lab_model/models/models.yaml").read_text())
        entries += [{"id": "tiny", "kind": "chat", "source": "file:/tiny", "dtype": "float32"}]
        (stack.root / "catalogue.yaml").write_text(yaml.safe_dump(entries))
        (stack.root / "compose.override.yaml").write_text(yaml.safe_dump(TINY_LAYER))
        yield stack


def write_tiny(folder: Path, seed: int = 0) -> Path:
    """A tiny model that a container's user can read."""
    for file in tiny.write(folder, seed=seed).iterdir():
        file.chmod(0o644)  # safetensors writes 0600
    return folder


@contextmanager
def cloned(folder: Path) -> Iterator[Stack]:
    """A clone, not started, whose catalogue is ./catalogue.yaml. Nothing of it is left afterwards."""
    engine = docker.from_env(timeout=120)
    try:
        engine.ping()
        root = folder / "lab"
        root.mkdir(mode=0o755)
        clone(root)
        stack = Stack(root, engine, f"labtest{os.getpid()}", variables={"MODEL_CATALOGUE": "./catalogue.yaml"})
        try:
            with stack.http:
                yield stack
        finally:
            stack.compose("--profile=*", "down", "--volumes", "--remove-orphans", "--timeout=5", timeout=180)
            for image in engine.images.list(filters={"reference": f"llm-lab/*:{stack.project}*"}):
                for tag in image.tags:
                    if stack.project in tag:
                        engine.images.remove(tag)
    finally:
        engine.close()


@dataclass
class Asked:
    """One request's outcome. cache: its Cache-Status."""

    status: int
    cache: str

    @property
    def hit(self) -> bool:
        return "; hit" in self.cache


@contextmanager
def asking(url: str, body: dict[str, Any], pause: float = 0.1) -> Iterator[list[Asked]]:
    """Ask the same again and again as long as the block runs. A request without any answer counts as status 0."""
    answers: list[Asked] = []
    ended = threading.Event()

    def ask() -> None:
        with httpx2.Client(timeout=60) as client:
            while not ended.wait(pause):
                try:
                    answer = client.post(f"{url}/v1/chat/completions", json=body)
                    status, cache = answer.status_code, answer.headers.get("cache-status", "")
                except httpx2.HTTPError as error:
                    status, cache = 0, repr(error)
                answers.append(Asked(status, cache))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        ended.set()
        thread.join(90)


def within(what: str, true: Callable[[], Any], *, seconds: float = GENEROUS_SECONDS, pause: float = 0.2) -> float:
    """Wait until `true`; how long it took, to be told. An exception of the HTTP client is a no."""
    began = time.monotonic()
    while True:
        try:
            if true():
                return time.monotonic() - began
        except httpx2.HTTPError:
            pass
        if time.monotonic() - began > seconds:
            raise AssertionError(f"not within {seconds:.0f} s: {what}")
        time.sleep(pause)


def build_steps(said: str) -> dict[str, bool]:
    """Of the plain output of a build: each step, as `[proxy code 2/3] COPY …`, and whether it came from the cache."""
    names = dict(re.findall(r"^#(\d+) (\[.+)$", said, re.M))
    cached = set(re.findall(r"^#(\d+) CACHED$", said, re.M))
    return {name: number in cached for number, name in names.items()}


def tail(text: str, lines: int = 40) -> str:
    return "\n".join(text.splitlines()[-lines:])


def added(engine: docker.DockerClient, image: str, base: str = BASE) -> int:
    """Bytes that the layers of `image` add to those of its base."""
    return int(engine.images.get(image).attrs["Size"] - engine.images.get(base).attrs["Size"])


def published(container: Container) -> Sequence[dict[str, str]]:
    bindings = container.attrs["HostConfig"]["PortBindings"] or {}
    return [one for bound in bindings.values() for one in bound]


Tell = Callable[[str], None]


def telling(request: pytest.FixtureRequest, lane: str) -> Tell:
    """Prints a line for whoever watches: what was measured."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def line(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{lane}: {text}", flush=True)  # noqa: T201 that is its purpose

    return line
