"""The RayService's serveConfigV2, run by `serve run` on a Ray of its own, with tiny weights in place of real ones.

Its replicas share no folder with the application at /: as on nodes of their own, they are asked over the network.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest
import tiny
import yaml
from manifests import K8S
from processes import SHOWN_ON_FAILURE, Process, eventually, free_port, process

SERVE = Path(sys.executable).with_name("serve")
CHAT = "smollm2-135m-instruct"
START_SECONDS = 270  # Ray Serve and two replicas on two busy cores
REQUESTS = 12


def config(weights: Path, port: int) -> dict[str, Any]:
    """serve.yaml with one chat model of tiny weights, on two replicas that reserve no whole core of this machine."""
    made: dict[str, Any] = yaml.safe_load((K8S / "model/rayservice/serve.yaml").read_text())
    made["http_options"] |= {"host": "127.0.0.1", "port": port}
    catalogue, chat, _ = made["applications"]
    small = {"source": f"file:{weights}", "dtype": "float32", "replicas": {"min": 2, "max": 3}}
    entry = chat["args"]["entry"] | small
    chat["args"] |= {"entry": entry, "cpus": 0.1, "threads": 1}
    catalogue["args"]["entries"] = [entry]
    made["applications"] = [catalogue, chat]
    return made


@pytest.fixture(scope="module")
def own_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder, port = tmp_path_factory.mktemp("serve"), free_port()
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config(tiny.write(folder / "tiny"), port)))
    env = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    argv = [SERVE, "run", "--address", "local", path]
    with process("serve", argv, port=port, log_dir=folder, env=env, ready="/ready", timeout=START_SECONDS) as started:
        yield started


@pytest.fixture
def http(own_ray: Process) -> Iterator[httpx2.Client]:
    # No connection is kept: the tests end a replica.
    limits = httpx2.Limits(max_keepalive_connections=0)
    with httpx2.Client(base_url=own_ray.url, timeout=60, limits=limits, event_hooks=SHOWN_ON_FAILURE) as client:
        yield client


def raylet(own_ray: Process) -> psutil.Process:
    return next(each for each in psutil.Process(own_ray.popen.pid).children(recursive=True) if each.name() == "raylet")


def replicas(own_ray: Process) -> list[psutil.Process]:
    """The processes of the model's replicas: Ray names them after their deployment."""
    found = []
    for each in psutil.Process(own_ray.popen.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it is ending
            if f"ServeReplica:{CHAT}" in " ".join(each.cmdline()):
                found.append(each)
    return found


def generated(http: httpx2.Client) -> float:
    """Tokens that all replicas together have generated."""
    page = http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in page if line.startswith("vllm:generation_tokens_total{"))


def ask(http: httpx2.Client, id_: str) -> int:
    """A request under this id; the tokens that it generated."""
    body = {"model": CHAT, "messages": [{"role": "user", "content": id_}], "max_tokens": 3}
    answer = http.post(f"/m/{CHAT}/v1/chat/completions", json=body, headers={"x-request-id": id_, "x-call-id": id_})
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["completion_tokens"])


def test_the_model_answers_where_the_proxy_asks(own_ray: Process, http: httpx2.Client) -> None:
    """Listed and ready at /, on all replicas; its requests at /m/<model>; and nothing else is accepted at /."""
    (listed,) = http.get("/v1/models").json()["data"]
    assert (listed["id"], listed["kind"]) == (CHAT, "chat")
    eventually(lambda: http.get("/ready").json()["models"][0]["replicas"] == 2, what="both replicas answer")
    with openai.OpenAI(base_url=f"{own_ray.url}/m/{CHAT}/v1", api_key="any", max_retries=0, timeout=60) as client:
        messages: list[Any] = [{"role": "user", "content": "Hello"}]
        stream = client.chat.completions.create(model=CHAT, messages=messages, max_tokens=8, stream=True)
        assert len(list(stream)) > 1
    refused = http.post("/v1/chat/completions", json={"model": CHAT, "messages": []})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "not_found")
    assert "/m/<model>/v1/chat/completions" in refused.json()["error"]["message"]


def test_metrics_and_usage_add_up_over_replicas(http: httpx2.Client) -> None:
    before = generated(http)
    ids = [f"call-{number}" for number in range(REQUESTS)]
    tokens = {id_: ask(http, id_) for id_ in ids}
    eventually(lambda: generated(http) == before + sum(tokens.values()), what="all replicas' tokens are in the sum")
    used = http.get("/tally", params={"id": ids}).json()
    assert {id_: used[id_]["completion"] for id_ in ids} == tokens


def test_the_sum_does_not_fall_when_a_replica_ends(own_ray: Process, http: httpx2.Client) -> None:
    """Prometheus would take that for a restart. Serve starts another replica in its place."""
    for number in range(REQUESTS):
        ask(http, f"before-{number}")
    before = generated(http)
    ended = replicas(own_ray)[0]
    os.kill(ended.pid, signal.SIGKILL)
    eventually(lambda: ended.pid not in [each.pid for each in replicas(own_ray)], what="the replica has ended")
    eventually(lambda: len(replicas(own_ray)) == 2, within=START_SECONDS, what="another replica is there")
    assert generated(http) >= before


def test_a_node_is_drained_before_its_pod_ends(own_ray: Process, tmp_path: Path) -> None:
    """What a worker's preStop runs: Ray accepts it, and it waits while replicas are left. Here they have no other node
    to go to, so that this test comes last."""
    node = raylet(own_ray)
    gcs = next(each.partition("=")[2] for each in node.cmdline() if each.startswith("--gcs-address="))
    # With the token that Ray made for this cluster: in a pod KubeRay sets it.
    environ = node.environ() | {"RAY_ADDRESS": gcs, "MY_POD_IP": "10.9.9.9"}
    argv = [sys.executable, "-m", "lab_model.serving.drain_node"]
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, "10.9.9.9 is not a node" in done.stderr) == (1, True), done.stderr
    log = tmp_path / "drain.log"
    environ["MY_POD_IP"] = gcs.partition(":")[0]
    with log.open("wb") as out, subprocess.Popen(argv, env=environ, stderr=out) as draining:
        try:
            eventually(lambda: "draining the Ray node" in log.read_text(), what="Ray drains the node")
            assert draining.poll() is None
        finally:
            draining.kill()
