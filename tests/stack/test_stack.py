"""The lab in containers: built from a clean copy, brought up by `make up`, looked at from all sides, then broken.

The tests build on one another in the order they stand in; those that break something leave it whole.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from fixtures_proxy import PATIENT_MS
from fixtures_stack import BASE, Stack, Tell, added, asking, build_steps, published, stack_in, telling, within

if TYPE_CHECKING:
    from _pytest.tmpdir import TempPathFactory

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

CHAT = "smollm2-135m-instruct"
SERVICES = ["ui", "proxy", "model", "redis", "load"]
PARIS = {
    "model": CHAT,
    "temperature": 0,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
}
# What `make up` builds the model's image with; for the builds that do not go through it.
CPU = {"MODEL_BASE_IMAGE": BASE, "TORCH_INDEX_URL": "https://download.pytorch.org/whl/cpu"}
MB = 1_000_000
BUILD_SECONDS = 600  # docs/containers.md promises it for a clean clone on two cores
# What an image may add to its base.
LIMITS = {"ui": 600 * MB, "proxy": 150 * MB, "load": 200 * MB, "model": 2_200 * MB}


@pytest.fixture(scope="module")
def tell(request: pytest.FixtureRequest) -> Tell:
    return telling(request, "stack")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: TempPathFactory, tell: Tell) -> Iterator[Stack]:
    with stack_in(tmp_path_factory.mktemp("stack")) as made:
        # Redis waits for a busy disk, as after a build: what is not about that has time for it.
        made.variables["PROXY_REDIS_TIMEOUT_MS"] = PATIENT_MS
        began = time.monotonic()
        made.run("env", *(f"{name}={value}" for name, value in CPU.items()), "docker", "compose", "build",
                 timeout=BUILD_SECONDS)  # fmt: skip
        tell(f"built from a clean clone in {time.monotonic() - began:.0f} s")
        began = time.monotonic()
        made.run("make", "up", timeout=900)
        tell(f"healthy after {time.monotonic() - began:.0f} s")
        made.variables |= CPU
        yield made


@pytest.fixture(autouse=True)
def _shown_on_failure(request: pytest.FixtureRequest, stack: Stack, tell: Tell) -> Iterator[None]:
    before = request.session.testsfailed
    yield
    if request.session.testsfailed > before:
        tell(f"{request.node.name} failed; the ends of the containers' logs:\n{stack.logs()}")


def chat(stack: Stack, **more: Any) -> httpx2.Response:
    return stack.http.post(f"{stack.proxy_url}/v1/chat/completions", json=PARIS | more)


def answers(stack: Stack) -> bool:
    return chat(stack).status_code == 200


def streamed(stack: Stack, max_tokens: int) -> Iterator[str]:
    """The data of each event of a long answer that no cache holds."""
    body = {
        "model": CHAT,
        "temperature": 0,
        "max_tokens": max_tokens,
        "logit_bias": {"2": -100},  # <|im_end|>: it goes on for as long as it may
        "stream": True,
        "messages": [{"role": "user", "content": "Count from one to a thousand in words."}],
    }
    url = f"{stack.proxy_url}/v1/chat/completions"
    with stack.http.stream("POST", url, json=body, headers={"cache-control": "no-store"}) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: "):
                yield line.removeprefix("data: ")


@pytest.mark.timeout(1800)
def test_it_comes_up_healthy_and_answers(stack: Stack, tell: Tell) -> None:
    """`make up` on a clean copy returns when every service is healthy; the second answer is a hit."""
    assert sorted(each.labels["com.docker.compose.service"] for each in stack.containers()) == sorted(SERVICES)
    assert {service: stack.health(service) for service in SERVICES} == dict.fromkeys(SERVICES, "healthy")
    first, second = chat(stack), chat(stack)
    assert "Paris" in first.json()["choices"][0]["message"]["content"]
    assert "; hit" in second.headers["cache-status"]
    for service in SERVICES:
        used = stack.container(service).stats(stream=False)["memory_stats"]["usage"]
        tell(f"{service} uses {used / 2**20:.0f} MiB")


def test_it_stays_up_when_asked_again(stack: Stack, tell: Tell) -> None:
    """A second `make up` builds nothing anew and leaves the containers alone."""
    before = {each.id for each in stack.containers()}
    began = time.monotonic()
    stack.run("make", "up", timeout=600)
    tell(f"make up again: {time.monotonic() - began:.0f} s")
    assert {each.id for each in stack.containers()} == before


def test_the_ui_is_there_and_sees_the_others(stack: Stack) -> None:
    assert stack.http.get(f"{stack.ui_url}/_stcore/health").text == "ok"
    assert "text/html" in stack.http.get(stack.ui_url).headers["content-type"]
    code, said = stack.inside(
        "ui", "python", "-c", "import httpx2; print(httpx2.get('http://proxy:8080/status', timeout=5).text)"
    )
    assert code == 0, said
    status = json.loads(said)
    assert (status["redis"]["state"], status["model"]["state"]) == ("up", "up")
    assert status["model"]["device"] == "cpu"
    assert status["proxy"]["upstreams"][1] == {"name": "openai", "configured": False}


# ---- the contract


def test_the_proxy_keeps_the_contract_from_outside(stack: Stack, tell: Tell) -> None:
    stack.variables["LAB_TEST_PROXY_URL"] = stack.proxy_url
    said = stack.run(
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-k", "[proxy", "tests/proxy/test_contract.py",
        timeout=240,
    )  # fmt: skip
    tell(f"contract of the proxy: {said.splitlines()[-1]}")
    assert int(re.findall(r"(\d+) passed", said)[0]) >= 50


SUITE = f"""\
FROM {BASE}
RUN python3 -m venv /opt/venv
COPY constraints.txt /
RUN --mount=type=cache,target=/root/.cache/pip /opt/venv/bin/pip install -q -c /constraints.txt \
    httpx2 openai pytest pytest-asyncio pytest-timeout pyyaml
"""


def test_the_model_keeps_the_contract_from_inside(stack: Stack, tell: Tell) -> None:
    """From a container of its own on the back network, where nothing but the proxy and redis stands."""
    image = f"llm-lab/suite:{stack.project}"
    stack.run("docker", "build", "-q", "-t", image, "-f", "-", ".", timeout=300, given=SUITE)
    said = stack.run(
        "docker", "run", "--rm", f"--network={stack.network('back')}", "--user=10001", f"--volume={stack.root}:/lab:ro",
        "--workdir=/lab", "--env=PYTHONDONTWRITEBYTECODE=1", "--env=LAB_TEST_MODEL_URL=http://model:8000", image,
        "/opt/venv/bin/python", "-m", "pytest", "-p", "no:cacheprovider", "-q", "-k", "not [proxy",
        "tests/proxy/test_contract.py", timeout=240,
    )  # fmt: skip
    tell(f"contract of the model: {said.splitlines()[-1]}")
    assert int(re.findall(r"(\d+) passed", said)[0]) >= 50


# ---- hardening


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_is_hardened(stack: Stack, service: str) -> None:
    """As Docker was told, and as the process inside finds it."""
    container = stack.container(service)
    host, config = container.attrs["HostConfig"], container.attrs["Config"]
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert not host["Privileged"]
    assert "no-new-privileges:true" in host["SecurityOpt"]
    assert host["PidsLimit"] > 0
    assert host["Memory"] > 0
    assert host["Init"]
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert host["LogConfig"] == {"Type": "json-file", "Config": {"max-file": "3", "max-size": "10m"}}
    assert config["User"] not in ("", "0", "root")
    assert config["Healthcheck"]["Test"]
    code, said = stack.inside(service, "bash", "-c", "cat /proc/1/status; touch /srv/x /etc/x 2>&1; id -u")
    assert code == 0
    assert said.split()[-1] != "0"
    assert said.count("Read-only file system") == 2
    for field in ("CapEff", "CapPrm", "CapBnd"):
        assert re.search(rf"{field}:\s+0+\n", said)
    assert re.search(r"NoNewPrivs:\s+1\n", said)


def test_model_and_redis_are_not_published_and_the_others_on_loopback(stack: Stack) -> None:
    ports = {service: published(stack.container(service)) for service in SERVICES}
    assert ports["model"] == ports["redis"] == []
    for service in ("ui", "proxy", "load"):
        assert [one["HostIp"] for one in ports[service]] == ["127.0.0.1"]


def test_streams_may_end_before_a_container_is_killed(stack: Stack) -> None:
    """Docker waits longer after SIGTERM than the service lets running answers go on."""
    for service, drain in (("proxy", 30), ("model", 30)):
        assert stack.container(service).attrs["Config"]["StopTimeout"] > drain


REACH = """\
import socket, sys
from concurrent.futures import ThreadPoolExecutor

def attempt(place):
    host, port = place.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), 2).close()
    except OSError as error:
        return f"{place} closed: {error}"
    return f"{place} open"

with ThreadPoolExecutor(50) as pool:
    print(*pool.map(attempt, sys.argv[1:]), sep="\\n")
"""


def reached(stack: Stack, service: str, *places: str) -> set[str]:
    """Which of these host:port a process inside the service can connect to."""
    if service == "redis":  # has no Python
        tries = [
            stack.inside(service, "timeout", "2", "bash", "-c", f"</dev/tcp/{place.replace(':', '/')}")
            for place in places
        ]
        return {place for place, (code, _) in zip(places, tries, strict=True) if code == 0}
    code, said = stack.inside(service, "python", "-c", REACH, *places)
    assert code == 0, said
    return {line.split()[0] for line in said.splitlines() if line.endswith(" open")}


def test_model_and_redis_have_no_way_out(stack: Stack) -> None:
    """Neither to another network's container nor to the world; the proxy, which is on both, reaches the former."""
    ui = f"{stack.address('ui', 'front')}:8501"
    assert reached(stack, "proxy", ui) == {ui}
    for service in ("model", "redis"):
        assert reached(stack, service, ui, "ui:8501", "1.1.1.1:443", "example.com:443") == set()
    # Where they may go, they do: it is the network that holds, not a broken test.
    assert reached(stack, "redis", "model:8000") == {"model:8000"}
    assert reached(stack, "model", "redis:6379") == {"redis:6379"}


def listening(stack: Stack, service: str) -> set[int]:
    """Every TCP port that a process in the container listens on, by the kernel's own tables."""
    code, said = stack.inside(service, "bash", "-c", "cat /proc/net/tcp /proc/net/tcp6")
    assert code == 0, said
    rows = [line.split() for line in said.splitlines()]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A"}


# A call to a Serve replica's own gRPC server, which listens on every address; it unpickles what it takes.
CALL = """\
import sys, grpc
from ray.serve.generated import serve_pb2, serve_pb2_grpc
for place in sys.argv[1:]:
    stub = serve_pb2_grpc.ASGIServiceStub(grpc.insecure_channel(place))
    try:
        stub.HandleRequest(serve_pb2.ASGIRequest(pickled_request_metadata=b"x"), timeout=5)
        print("answered")
    except grpc.RpcError as error:
        print(error.code().name)
"""


def test_rays_dashboard_and_jobs_cannot_be_reached(stack: Stack) -> None:
    """From front nothing of the model; from back its API, and replicas that turn away who has not Ray's token."""
    address = stack.address("model", "back")
    ports = listening(stack, "model")
    assert 52365 in ports, "Ray's agent, which takes jobs, listens elsewhere now"
    places = [f"{address}:{port}" for port in sorted(ports | {8265})]
    assert reached(stack, "ui", *places, "model:8000", "redis:6379") == set()
    open_places = reached(stack, "proxy", *places)
    assert f"{address}:8000" in open_places
    assert not open_places & {f"{address}:8265", f"{address}:52365"}
    replicas = sorted(open_places - {f"{address}:8000"})
    said = stack.run(
        "docker", "run", "--rm", f"--network={stack.network('back')}", "--entrypoint=python",
        f"llm-lab/model:{stack.project}", "-c", CALL, *replicas, timeout=60,
    )  # fmt: skip
    assert set(said.split()) <= {"UNAUTHENTICATED"}


# ---- images


def test_images_are_small_and_say_what_they_are(stack: Stack, tell: Tell) -> None:
    for service, limit in LIMITS.items():
        image = f"llm-lab/{service}:{stack.project}"
        size = added(stack.engine, image)
        tell(f"{service} adds {size / MB:.0f} MB to its base")
        assert size <= limit
        labels = stack.engine.images.get(image).labels
        for name in ("title", "description", "version", "licenses"):
            assert labels[f"org.opencontainers.image.{name}"]


def test_what_the_images_hold_is_listed(stack: Stack) -> None:
    """`make sbom`: each image's own packages, and the id of the image that they were read from."""
    stack.run(sys.executable, "-m", "lab.sbom", stack.project, timeout=300)
    released = json.loads((stack.root / "dist/images.json").read_text())
    for service, package in {
        "proxy": "pypi/uvicorn",
        "model": "pypi/ray",
        "ui": "pypi/streamlit",
        "redis": "deb/",
    }.items():
        listed = json.loads((stack.root / f"dist/{service}.cdx.json").read_text())
        assert any(each["purl"].startswith(f"pkg:{package}") for each in listed["components"]), service
        image = stack.engine.images.get(f"llm-lab/{service}:{stack.project}")
        assert released[f"llm-lab/{service}:{stack.project}"]["id"] == image.id


@pytest.mark.parametrize("service", ["ui", "proxy", "model"])
def test_images_hold_no_tools_to_build_with(stack: Stack, service: str) -> None:
    """Neither pip nor its cache, and nothing that the base's own packages do not hold."""
    code, said = stack.inside(
        service, "bash", "-c", "ls /opt/venv/bin/pip* /root/.cache /var/lib/apt/lists/*_Packages 2>&1"
    )
    assert code != 0
    assert "/opt/venv/bin/pip\n" not in said
    layers = [layer["CreatedBy"] for layer in stack.engine.images.get(f"llm-lab/{service}:{stack.project}").history()]
    ours = layers[: next(i for i, made in enumerate(layers) if "groupadd" in made) + 1]
    assert not [made for made in ours if "gcc" in made or "build-essential" in made]


@pytest.mark.parametrize("service", ["proxy", "model"])
def test_a_change_of_code_installs_no_package_again(stack: Stack, service: str, tell: Tell) -> None:
    """The steps of the build that install packages come from its cache; those that hold the code are made anew."""
    code = stack.root / f"services/{service}/lab_{service}/__init__.py"
    before = code.read_text()
    stack.variables["LAB_TAG"] = f"{stack.project}-changed"
    try:
        code.write_text(f"{before}\n# changed: {uuid.uuid4().hex}\n")  # no earlier run has built that
        began = time.monotonic()
        said = stack.compose("build", service, timeout=600)
    finally:
        del stack.variables["LAB_TAG"]
        code.write_text(before)
    tell(f"{service} rebuilt after a change of code in {time.monotonic() - began:.1f} s")
    steps = build_steps(said)
    installing = {name: cached for name, cached in steps.items() if re.search(r"\b(pip|apt-get) install\b", name)}
    assert installing, said
    assert [name for name, cached in installing.items() if not cached] == []
    copied = [cached for name, cached in steps.items() if f"COPY services/{service}/lab_{service} " in name]
    assert copied == [False], said


def test_without_a_gpu_cuda_stops_the_start(stack: Stack) -> None:
    """`MODEL_DEVICE: cuda`, which compose.gpu.yaml sets, never falls back to the CPU."""
    rendered = json.loads(stack.run(
        "docker", "compose", "-f", "compose.yaml", "-f", "compose.gpu.yaml", "config", "--format", "json", timeout=30
    ))["services"]["model"]  # fmt: skip
    assert rendered["environment"]["MODEL_DEVICE"] == "cuda"
    assert rendered["deploy"]["resources"]["reservations"]["devices"][0]["driver"] == "nvidia"
    started = stack.engine.containers.run(
        f"llm-lab/model:{stack.project}", environment={"MODEL_DEVICE": "cuda"}, detach=True, network_mode="none",
        shm_size="1g", read_only=True, tmpfs={"/tmp": "mode=1777"}, init=True,  # noqa: S108
    )  # fmt: skip
    try:
        assert started.wait(timeout=240)["StatusCode"] == 2
        assert "MODEL_DEVICE is cuda, but no CUDA device was found" in started.logs().decode()
    finally:
        started.remove(force=True)


# ---- jobs


def test_the_weights_job_ends_and_says_where_they_lie(stack: Stack) -> None:
    said = stack.compose("--profile=setup", "run", "--rm", "--no-deps", "weights", timeout=180)
    for name in (CHAT, "all-minilm-l6-v2", "tiny"):
        assert f"model: {name} is in /" in said


@pytest.mark.parametrize("scenario", ["throughput", "caching"])
def test_load_runs_to_its_end_against_the_containers(stack: Stack, scenario: str, tell: Tell) -> None:
    stack.variables |= {"LOAD_USERS": "4", "LOAD_SECONDS": "10", "LOAD_MAX_TOKENS": "16", "LOAD_PROMPTS": "10"}
    said = stack.compose("run", "--rm", "--no-deps", "load", scenario, timeout=120)
    assert re.search(rf"/runs/{scenario}-\S+", said)
    tell(f"load {scenario} ran to its end")


def test_the_load_service_starts_a_test_for_the_page_and_for_no_stranger(stack: Stack) -> None:
    """The ui reaches the API by compose's name for it, a reader by the published port; pages of other origins and
    rebound names start nothing."""
    code, said = stack.inside(
        "ui", "python", "-c", "import os, httpx2; print(httpx2.get(os.environ['UI_LOAD_URL'] + '/runs').status_code)"
    )
    assert (code, said.strip()) == (0, "200"), said
    url, asked = f"http://127.0.0.1:{stack.load_port}/runs", {"workload": "throughput", "users": 2, "requests": 6}
    assert stack.http.post(url, json=asked, headers={"origin": "https://elsewhere.example"}).status_code == 403
    assert stack.http.post(url, json=asked, headers={"host": "rebound.example"}).status_code == 403
    assert stack.http.post(url, json=asked | {"max_tokens": 4}).status_code == 201
    within("the end of the run", lambda: stack.http.get(f"{url}/current").json()["state"] == "ended")
    current = stack.http.get(f"{url}/current").json()
    assert stack.http.get(f"{url}/{current['name']}").json()["results"]["throughput"]["answers"] == 6, current


# ---- faults


def test_redis_killed_fails_no_request_and_the_hits_come_back(stack: Stack, tell: Tell) -> None:
    """redis comes back by itself with what it held: the append-only file lies in a volume."""
    del stack.variables["PROXY_REDIS_TIMEOUT_MS"]  # from here on as people run it
    stack.compose("up", "--wait", "--no-deps", "proxy")
    chat(stack)
    restarts = stack.restarts("redis")
    with asking(stack.proxy_url, PARIS) as asked:
        within("hits before the fault", lambda: len(asked) > 3 and asked[-1].hit)
        stack.kill("redis")
        killed = len(asked)
        within("redis started again", lambda: stack.restarts("redis") > restarts, pause=0.02)
        first = len(asked)
        steady = lambda: len(asked) > first + 3 and all(one.hit for one in asked[-3:])  # noqa: E731
        back = within("hits after redis came back", steady, pause=0.05)
    missed = sum(not one.hit for one in asked[killed:])
    tell(f"redis killed: hits again {back:.1f} s after its restart; {missed} answers came from the model meanwhile")
    assert {one.status for one in asked} == {200}


def test_redis_paused_fails_no_request_and_the_hits_come_back(stack: Stack, tell: Tell) -> None:
    """Answers come while redis, which nobody wakes before they have come, says nothing."""
    redis = stack.container("redis")
    with asking(stack.proxy_url, PARIS) as asked:
        within("hits before the fault", lambda: len(asked) > 3 and asked[-1].hit)
        redis.pause()
        try:
            began = len(asked)
            within("answers without redis", lambda: len(asked) > began + 5)
            assert not asked[-1].hit
        finally:
            redis.unpause()
        back = within("hits after redis came back", lambda: all(one.hit for one in asked[-3:]), pause=0.05)
    tell(f"redis paused: hits again {back:.1f} s after its end")
    assert {one.status for one in asked} == {200}


def test_model_killed_mid_stream_is_an_error_event_then_it_recovers_by_itself(stack: Stack, tell: Tell) -> None:
    restarts = stack.restarts("model")
    seen: list[str] = []
    for data in streamed(stack, 1000):
        seen.append(data)
        if len(seen) == 5:
            stack.kill("model")
    assert json.loads(seen[-1])["error"]["type"] == "server_error"
    assert "[DONE]" not in seen
    killed = time.monotonic()
    refused = chat(stack, max_tokens=3)
    assert refused.status_code in (502, 503)
    assert refused.json()["error"]["type"] == "server_error"
    assert stack.http.get(stack.ui_url).status_code == 200
    within("the model answers again", lambda: chat(stack, max_tokens=4).status_code == 200, pause=1)
    tell(f"model killed: answers again after {time.monotonic() - killed:.0f} s")
    assert stack.restarts("model") > restarts
    within("model and proxy healthy", lambda: {stack.health("model"), stack.health("proxy")} == {"healthy"})


def test_proxy_stopped_mid_stream_lets_the_stream_end(stack: Stack, tell: Tell) -> None:
    """`docker stop` while an answer runs: the answer comes whole, and only then the container ends, by itself."""
    proxy = stack.container("proxy")
    stopping = threading.Thread(target=lambda: proxy.stop(timeout=45))
    seen: list[str] = []
    before = 0  # events until the proxy was seen to drain

    def draining() -> bool:
        try:
            return bool(stack.http.get(f"{stack.proxy_url}/ready").json()["status"] == "draining")
        except httpx2.HTTPError:
            return False

    began = time.monotonic()
    try:
        for data in streamed(stack, 300):
            seen.append(data)
            if len(seen) == 5:
                stopping.start()
            elif len(seen) > 5 and not before and draining():
                before = len(seen)
        ended = time.monotonic() - began
    finally:
        if stopping.ident:
            stopping.join(60)
        took = time.monotonic() - began
        proxy.reload()
        code = proxy.attrs["State"]["ExitCode"]
        proxy.start()
    assert seen[-1] == "[DONE]"
    assert json.loads(seen[-2])["choices"][0]["finish_reason"] in ("length", "stop")
    assert before, "the answer was over before the stop could have broken it"
    assert len(seen) > before + 20
    assert code == 0, "137: it was killed"
    proxy.reload()
    back = within("the proxy is healthy again", lambda: stack.health("proxy") == "healthy" and answers(stack))
    tell(f"proxy stopped: the stream ended after {ended:.1f} s, the container after {took:.1f} s, back in {back:.1f} s")


# ---- more than one proxy, with a key


def test_two_proxies_behind_one_port_share_cache_and_key(stack: Stack) -> None:
    """compose.scale.yaml; the loss of one of them fails no request but the one that it holds."""
    secrets = stack.root / "secrets"
    secrets.mkdir(mode=0o700)
    key = "sk-not-a-real-key-0123456789"
    (secrets / "openai_api_key").write_text(key)
    (secrets / "openai_api_key").chmod(0o444)
    stack.variables |= {"OPENAI_API_KEY_FILE": "./secrets/openai_api_key", "PROXY_REDIS_TIMEOUT_MS": PATIENT_MS}
    stack.layers = ("compose.scale.yaml",)
    stack.compose("up", "--build", "--wait", "--wait-timeout=240", timeout=300)
    proxies = stack.containers("proxy")
    assert len(proxies) == 2
    assert [published(one) for one in proxies] == [[], []]

    # 1. Both serve, from one cache; then one after the other dies, and its requests go to the other.
    with asking(stack.proxy_url, PARIS, pause=0.01) as asked:
        for one in proxies * 2:
            before = len(asked)
            within("forty answers", lambda asked=asked, before=before: len(asked) > before + 40)
            one.kill("SIGKILL")
            before = len(asked)
            within("forty more", lambda asked=asked, before=before: len(asked) > before + 40)
            one.start()
            within("all of them healthy again", lambda: stack.health("proxy") == "healthy")
    broken = [one for one in asked if one.status != 200]
    assert len(broken) <= len(proxies * 2)
    # 0: where a kept connection to the proxy ends without an answer, HAProxy closes the caller's.
    assert {one.status for one in broken} <= {0, 502}
    assert [one for one in asked[1:] if one.status == 200 and not one.hit] == []

    # 2. The key is a file that the proxy reads, and nowhere else.
    assert {"name": "openai", "configured": True} in stack.http.get(f"{stack.proxy_url}/status").json()["proxy"][
        "upstreams"
    ]
    for one in stack.containers():
        assert key not in json.dumps(one.attrs)
        assert key not in one.logs().decode(errors="replace")


def test_down_leaves_nothing(stack: Stack) -> None:
    """`make down` keeps the volumes, with `-v` nothing at all is left."""
    stack.run("make", "down", timeout=180)
    assert {name.rpartition("_")[2] for name in stack.left()} >= {"redis", "proxy", "weights"}
    assert stack.containers() == []
    stack.run("make", "down", "ARGS=-v", timeout=60)
    assert stack.left() == []
