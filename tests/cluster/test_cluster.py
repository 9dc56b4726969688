"""The model service on several Ray nodes, in containers: a head without replicas, and workers that are killed, added,
drained and given another revision under streams.

The tests build on one another in the order they stand in.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from fixtures_cluster import END, MODEL, WEIGHTS, Cluster, cluster_in, holds_replica, log_of
from fixtures_proxy import key_of
from fixtures_stack import Tell, telling, within

from bench.drill import HEALTHY, Target, streams

if TYPE_CHECKING:
    from _pytest.tmpdir import TempPathFactory

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

REQUESTS = 16
STREAMS = 4
SECONDS = 30  # of the drill's streams
KILLED_TOKENS = 8000  # so long that streams still run when the worker dies: 1,500 were over within 2 seconds


@pytest.fixture(scope="module")
def tell(request: pytest.FixtureRequest) -> Tell:
    return telling(request, "cluster")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: TempPathFactory, tell: Tell) -> Iterator[Cluster]:
    with cluster_in(tmp_path_factory.mktemp("cluster")) as made:
        began = time.monotonic()
        made.stack.compose("build", "proxy", "gate", "model", "redis", timeout=1200)
        tell(f"images built after {time.monotonic() - began:.0f} s")
        made.stack.compose("up", "--wait", "--wait-timeout=280", "gate", "worker", timeout=300)
        tell(f"healthy after {time.monotonic() - began:.0f} s")
        yield made


@pytest.fixture(autouse=True)
def _shown_on_failure(request: pytest.FixtureRequest, cluster: Cluster, tell: Tell) -> Iterator[None]:
    before = request.session.testsfailed
    yield
    if request.session.testsfailed > before:
        tell(f"{request.node.name} failed; the ends of the containers' logs:\n{cluster.stack.logs(25)}")


def target(cluster: Cluster) -> Target:
    return Target(cluster.stack.proxy_url, MODEL, END)


def ledger(cluster: Cluster) -> tuple[int, int]:
    sums = cluster.sums()
    return sums.requests, sums.tokens


def adds_up(cluster: Cluster, requests: int, tokens: int, model: int) -> bool:
    found = cluster.sums()
    return (found.requests, found.tokens, found.model) == (requests, tokens, model)


@pytest.mark.timeout(1500)
def test_each_replica_runs_on_a_worker_of_its_own(cluster: Cluster) -> None:
    """The head, which has no CPUs, holds none. The nodes have addresses of their own and share only the weights."""
    # Serve counts the lost replica until it has missed its health checks.
    within(
        "each worker has one", lambda: [holds_replica(each) for each in cluster.workers()] == [True, True], seconds=120
    )
    within("both replicas answer", lambda: cluster.replicas() == 2, seconds=90)
    assert not holds_replica(cluster.stack.container("model"))
    nodes = [cluster.stack.container("model"), *cluster.workers()]
    back = cluster.stack.network("back")
    assert len({each.attrs["NetworkSettings"]["Networks"][back]["IPAddress"] for each in nodes}) == 3
    for node in nodes:
        assert not [mount for mount in node.attrs["Mounts"] if mount["RW"] and mount["Type"] != "tmpfs"]


def test_counters_and_ledger_add_up_over_replicas(cluster: Cluster) -> None:
    """Of requests through both proxies, answered by both replicas: as many tokens as the answers had."""
    before = cluster.sums()
    answers = cluster.ask_many([f"question {number}" for number in range(REQUESTS)])
    assert [answer.status_code for answer in answers] == [200] * REQUESTS
    tokens = sum(answer.json()["usage"]["completion_tokens"] for answer in answers)
    within(
        "counters and ledger have every token",
        lambda: adds_up(cluster, before.requests + REQUESTS, before.tokens + tokens, before.model + tokens),
        seconds=60,
    )
    ids = [answer.headers["x-request-id"] for answer in answers]
    shares = [sum(id_ in log_of(worker) for id_ in ids) for worker in cluster.workers()]
    assert sum(shares) == REQUESTS
    assert min(shares) > 0, "one replica had all requests"


async def test_a_killed_worker_fails_only_the_streams_that_it_holds(cluster: Cluster, tell: Tell) -> None:
    """With an error event; streams on the other worker end whole, and so do all that begin afterwards."""
    killed, survivor = cluster.workers()
    async with streams(target(cluster), STREAMS, KILLED_TOKENS) as made:
        across = made.running
        killed.kill()
        await made.until(lambda: all(each.ended for each in across), "the streams of that time end", 240)
        ended = max(each.ended for each in across)
        await made.until(lambda: [each for each in made.running if each.began > ended], "another stream runs")
        await made.finish()
    cut = [each for each in made.all if each.state != "whole"]
    tell(f"worker killed: {len(cut)} of {len(made.all)} streams cut: {sorted({each.why for each in cut})}")
    assert [each.state for each in cut if each not in across] == [], "a stream that began later failed"
    assert 0 < len(cut) < len(across)
    assert [each.why for each in cut if not each.why.startswith("error event")] == []

    def survived() -> bool:
        kept = log_of(survivor)
        return [each.id in kept for each in made.all] == [each.state == "whole" for each in made.all]

    within("the other worker's log has the whole streams and no others", survived, seconds=60)


def test_a_worker_that_is_added_takes_the_lost_replica(cluster: Cluster) -> None:
    (dead,) = [each for each in cluster.stack.containers("worker") if each.status != "running"]
    dead.remove()
    assert [holds_replica(each) for each in cluster.workers()] == [True]
    cluster.scale(2)
    # Serve counts the lost replica until it has missed its health checks.
    within(
        "each worker has one", lambda: [holds_replica(each) for each in cluster.workers()] == [True, True], seconds=120
    )
    within("both replicas answer", lambda: cluster.replicas() == 2, seconds=90)


@pytest.mark.timeout(900)
def test_an_upgrade_cuts_no_stream(cluster: Cluster, tell: Tell) -> None:
    """`make drill` on this cluster: another revision, a drained worker, both proxies, under streams of 30 seconds.
    Then the cache keys have the new revision, and the ledger has every stream's tokens."""
    question = "What is the capital of France?"
    assert [cluster.ask(question).status_code for _ in range(2)] == [200, 200]
    old, before = cluster.ask(question), cluster.sums()
    cluster.scale(3)  # room for a replica that replaces another
    within("three workers are healthy", lambda: cluster.stack.health("worker") == "healthy")
    leaving = next(each for each in cluster.workers() if holds_replica(each))
    head, proxies = cluster.stack.container("model"), cluster.stack.containers("proxy")
    new = (cluster.stack.root / "catalogue.yaml").read_text().replace(*WEIGHTS)
    catalogue = shlex.quote(str(cluster.stack.root / "catalogue.yaml"))
    steps = {
        "revision": f"printf %s {shlex.quote(new)} >{catalogue}; "
        f"docker exec {head.id} python -m lab_model.serving.deploy --wait",
        "worker": f"docker exec {leaving.id} python -m lab_model.serving.drain_node && docker stop {leaving.id}",
        "proxies": "; ".join(f"one={proxy.id}; docker restart $one && {HEALTHY}" for proxy in proxies),
    }
    outcomes = run_drill(cluster, steps, tell)
    assert [outcome["step"] for outcome in outcomes] == ["probe", *steps]
    # A proxy refuses new requests while it drains, until the gate has seen that. No other step refuses any.
    assert [outcome["refused"] for outcome in outcomes[:-1]] == [0] * 3, outcomes
    for outcome in outcomes:
        assert outcome["during"] == STREAMS
        assert (outcome["cut"], outcome["failed"]) == (0, 0), outcome["why"]
    assert len(outcomes[1]["revisions"]) == 2, "no stream saw the other revision"
    assert len(outcomes[-1]["revisions"]) == 1
    assert len(cluster.workers()) == 2

    # The question is asked anew, of the new revision, and then it is a hit under another key.
    first, second = cluster.ask(question), cluster.ask(question)
    assert "; hit" in old.headers["cache-status"]
    assert "; hit" not in first.headers["cache-status"]
    assert first.headers["x-model-revision"] == outcomes[-1]["revisions"][0] != old.headers["x-model-revision"]
    assert first.json()["choices"][0]["message"]["content"] != old.json()["choices"][0]["message"]["content"]
    assert "; hit" in second.headers["cache-status"]
    assert key_of(second) != key_of(old)

    asked = sum(outcome["whole"] + outcome["refused"] for outcome in outcomes) + 2
    tokens = sum(outcome["completion_tokens"] for outcome in outcomes) + first.json()["usage"]["completion_tokens"]
    charged = before.requests + asked, before.tokens + tokens
    within("the ledger has every token", lambda: ledger(cluster) == charged, seconds=60)


def run_drill(cluster: Cluster, steps: dict[str, str], tell: Tell) -> list[dict[str, Any]]:
    """`python -m bench.drill` with these steps; its outcomes."""
    report = cluster.stack.root / "drill.json"
    argv = [sys.executable, "-m", "bench.drill", f"--proxy={cluster.stack.proxy_url}", f"--model={MODEL}"]
    argv += [f"--streams={STREAMS}", f"--seconds={SECONDS}", f"--body={json.dumps(END)}", f"--json={report}"]
    argv += [f"{name}={command}" for name, command in steps.items()]
    tell(cluster.stack.run(*argv, timeout=840))
    found: list[dict[str, Any]] = json.loads(report.read_text())
    return found


def test_down_leaves_nothing(cluster: Cluster) -> None:
    """`make down` ends the cluster, too."""
    cluster.stack.run("make", "down", "ARGS=-v --timeout 5", timeout=180)
    assert cluster.stack.left() == []
