"""The Ray cluster in containers for test_cluster.py: which worker holds a replica, what the services count.

The containers are those of tests/stack, with compose.cluster.yaml above them.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import yaml
from docker.models.containers import Container
from fixtures_proxy import PATIENT_MS
from fixtures_stack import BASE, Stack, cloned, write_tiny
from tiny import lengthen

MODEL = "tiny"
WEIGHTS = ("first", "second")  # of the two revisions
END = {"logit_bias": {"0": -100}}  # without the end token an answer has max_tokens
SETTINGS = {
    "MODEL_BASE_IMAGE": BASE,
    "TORCH_INDEX_URL": "https://download.pytorch.org/whl/cpu",
    "MODEL_THREADS": "1",
    "MODEL_KV_TOKENS": "65536",  # several answers of thousands of tokens
    # A worker has room for one replica and the catalogue's application.
    "MODEL_REPLICA_CPUS": "1.5",
    "MODEL_WORKER_CPUS": "2",
    "PROXY_REDIS_TIMEOUT_MS": PATIENT_MS,
    "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
}
LAYERS = ("compose.scale.yaml", "compose.cluster.yaml")


@dataclass
class Sums:
    """model: completion tokens by all replicas' counters. requests, tokens: by the ledger."""

    model: int
    requests: int
    tokens: int


@dataclass
class Cluster:
    """The lab on a head and workers, asked through the gate."""

    stack: Stack

    def catalogue(self, weights: str) -> None:
        """What the next deployment serves. The file is kept: the head has it mounted."""
        entry = {
            "id": MODEL,
            "kind": "chat",
            "source": f"file:/weights/{weights}",
            "dtype": "float32",
            "replicas": 2,
        }
        (self.stack.root / "catalogue.yaml").write_text(yaml.safe_dump([entry]))

    def workers(self) -> list[Container]:
        return [each for each in self.stack.containers("worker") if each.status == "running"]

    def scale(self, workers: int) -> None:
        """Start further workers; those that run stay."""
        # Without --wait: a worker that was killed is there, too.
        self.stack.compose("up", "--detach", "--no-recreate", "--no-deps", f"--scale=worker={workers}", "worker")

    def replicas(self) -> int:
        """Replicas that answered when the model was asked last."""
        status = self.stack.http.get(f"{self.stack.proxy_url}/status").json()
        return sum(int(each.get("replicas", 0)) for each in status["model"].get("models", []))

    def ask(self, text: str, **more: Any) -> httpx2.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 24}
        return self.stack.http.post(f"{self.stack.proxy_url}/v1/chat/completions", json=body | END | more)

    def ask_many(self, texts: list[str]) -> list[httpx2.Response]:
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self.ask, texts))

    def sums(self) -> Sums:
        script = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000/metrics').read().decode())"
        code, page = self.stack.inside("model", "python", "-c", script)
        assert code == 0, page
        generated = [line for line in page.splitlines() if line.startswith("vllm:generation_tokens_total{")]
        ledger = self.stack.http.get(f"{self.stack.proxy_url}/usage").json()["total"]
        model = sum(float(line.rpartition(" ")[2]) for line in generated)
        return Sums(int(model), ledger["requests"], ledger["completion_tokens"])


def holds_replica(container: Container) -> bool:
    """Ray names the processes of replicas after application and deployment."""
    found = container.top()["Processes"] or []
    return any(f"ServeReplica:{MODEL}:{MODEL}" in " ".join(process) for process in found)


def log_of(container: Container) -> str:
    return str(container.logs().decode(errors="replace"))


@contextmanager
def cluster_in(folder: Path) -> Iterator[Cluster]:
    """Not started. Nothing of it is left afterwards."""
    with cloned(folder) as stack:
        for seed, name in enumerate(WEIGHTS):
            lengthen(write_tiny(stack.root / "weights" / name, seed))
        stack.variables |= SETTINGS
        stack.layers = LAYERS
        layer = {"services": {"worker": {"volumes": ["./weights:/weights:ro"]}}}
        (stack.root / "compose.override.yaml").write_text(yaml.safe_dump(layer))
        cluster = Cluster(stack)
        cluster.catalogue(WEIGHTS[0])
        yield cluster
