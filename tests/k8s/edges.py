"""Who may speak to whom: what the network policies add up to, and the one table that says what they should."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from manifests import SERVICE, Manifest, of_kind, pods, selects

NAMESPACE = "llm-lab"
ANY = 40_000  # stands for a port that no table names
PORTS = (22, 53, 443, 3000, 4318, 5353, 5557, 6379, 6443, 8000, 8080, 8089, 8265, 8501, 9090, 10001, ANY)

Edge = tuple[str, str, int]  # from, to, port


@dataclass(frozen=True)
class Peer:
    """A pod or an address. namespace: empty for an address outside the cluster."""

    name: str
    address: str
    namespace: str = ""
    labels: dict[str, str] = field(default_factory=dict)


# Whatever is not the lab's.
OUTSIDE = (
    Peer("internet", "1.1.1.1"),
    Peer("metadata", "169.254.169.254"),  # a cloud's service that hands out credentials
    Peer("api-server", "172.18.0.2"),
    Peer("dns", "10.96.0.10", "kube-system", {"k8s-app": "kube-dns"}),
    Peer("ingress", "10.1.0.1", "traefik", {"app.kubernetes.io/name": "traefik"}),
    Peer("keda", "10.1.0.2", "keda", {"app": "keda-operator"}),
    Peer("kuberay", "10.1.0.3", "kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"}),
    Peer("vllm", "10.1.0.4", "vllm", {"app": "vllm"}),
    Peer("collector", "10.1.0.6", "observability", {"app": "collector"}),
    Peer("stranger", "10.1.0.5", "default", {SERVICE: "proxy"}),  # with our label, elsewhere
)
_RAY = ("ray-head", "ray-worker")

# The table. A service that resolves names also has the edges to any resolver (`RESOLVING`).
BASE: set[Edge] = {("ui", "proxy", 8080), ("proxy", "redis", 6379)}
RESOLVING = {"ui", "proxy", "load", "load-worker", "weights", "prometheus", "grafana", *_RAY}
DEPLOYMENT: set[Edge] = {("proxy", "model", 8000)}
RAYSERVICE: set[Edge] = {
    *((a, b, port) for a in _RAY for b in _RAY for port in PORTS),
    *(("proxy", node, 8000) for node in _RAY),
    ("kuberay", "ray-head", 8265),
    ("kuberay", "ray-head", 8000),
    # Policies see the API server's endpoint, whose address differs: its ports, on all private networks.
    *(("ray-head", to, port) for port in (443, 6443)
      for to in ("api-server", "dns", "ingress", "keda", "kuberay", "vllm", "collector", "stranger")),
}  # fmt: skip
COMPONENT: dict[str, set[Edge]] = {
    "external-model": {("proxy", "vllm", 8000)},
    "files": set(),
    "gpu": set(),
    "ingress": {("ingress", "proxy", 8080), ("ingress", "ui", 8501)},
    "keda": {("keda", "prometheus", 9090)},
    "load": {("load", "proxy", 8080), ("load-worker", "proxy", 8080), ("load-worker", "load", 5557)},
    "monitoring": {("prometheus", "proxy", 8080), ("prometheus", "model", 8000), ("grafana", "prometheus", 9090)},
    "openai-key": {("proxy", "internet", 443)},
    "redis-gcs": {("ray-head", "redis-gcs", 6379)},
    "traces": {(each, "collector", 4318) for each in ("ui", "proxy", "model", *_RAY)},
    "weights": {("weights", "internet", 443)},
}


def wanted(parts: Iterable[str], manifests: tuple[Manifest, ...]) -> set[Edge]:
    """The table's edges for a combination. parts: model and components."""
    parts = set(parts)
    there = {peer.name for peer in _inside(manifests)} | {peer.name for peer in OUTSIDE}
    found = set(BASE)
    found |= DEPLOYMENT if "deployment" in parts else RAYSERVICE if "rayservice" in parts else set()
    for part in parts & set(COMPONENT):
        found |= COMPONENT[part]
    if "monitoring" in parts:
        found |= {("prometheus", node, 8000) for node in _RAY}
        found |= {("prometheus", "vllm", 8000)} if "external-model" in parts else set()
    everyone = [peer.name for peer in OUTSIDE]
    resolving = RESOLVING | {"model"} if "traces" in parts else RESOLVING
    found |= {(name, to, port) for name in resolving for to in everyone for port in (53, 5353)}
    return {edge for edge in found if edge[0] in there and edge[1] in there}


def allowed(manifests: tuple[Manifest, ...]) -> set[Edge]:
    """What the policies allow: for an edge between two of our pods both ends must."""
    policies = [made["spec"] for made in of_kind(manifests, "NetworkPolicy").values()]
    inside = list(_inside(manifests))
    everyone = [*inside, *OUTSIDE]
    return {
        (source.name, target.name, port)
        for source in everyone
        for target in everyone
        if source in inside or target in inside
        for port in PORTS
        if (source not in inside or _passes(policies, "Egress", source, target, port))
        and (target not in inside or _passes(policies, "Ingress", target, source, port))
    }


def _inside(manifests: tuple[Manifest, ...]) -> Iterator[Peer]:
    for number, pod in enumerate(pods(manifests)):
        name = pod.name if pod.name.startswith("ray-") else pod.service
        yield Peer(name, f"10.2.0.{number + 1}", NAMESPACE, pod.labels)


def _passes(policies: list[dict[str, Any]], way: str, pod: Peer, other: Peer, port: int) -> bool:
    """Kubernetes' rule: a pod that no policy selects may do all; else one rule must fit."""
    chosen = [each for each in policies if selects(each["podSelector"], pod.labels) and way in each["policyTypes"]]
    if not chosen:
        return True
    key, peers = ("ingress", "from") if way == "Ingress" else ("egress", "to")
    for rule in (rule for each in chosen for rule in each.get(key, [])):
        ports = rule.get("ports")
        if ports and not any(port == each["port"] for each in ports):
            continue
        if not rule.get(peers) or any(_fits(peer, other) for peer in rule[peers]):
            return True
    return False


def _fits(rule: dict[str, Any], other: Peer) -> bool:
    if "ipBlock" in rule:
        address = ipaddress.ip_address(other.address)
        if any(address in ipaddress.ip_network(each) for each in rule["ipBlock"].get("except", [])):
            return False
        return address in ipaddress.ip_network(rule["ipBlock"]["cidr"])
    if not other.namespace:
        return False
    if "namespaceSelector" in rule:
        names = {"kubernetes.io/metadata.name": other.namespace}
        if not selects(rule["namespaceSelector"], names):
            return False
    elif other.namespace != NAMESPACE:
        return False
    return selects(rule["podSelector"], other.labels) if "podSelector" in rule else True
