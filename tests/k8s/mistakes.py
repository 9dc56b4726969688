"""Mistakes to plant into rendered manifests, each with words of the complaint that must find it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import edges
import yaml
from manifests import NODE_TYPE, SERVICE, Manifest

Mistake = Callable[[list[Manifest]], object]


def find(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    """A manifest by its name without the hash of its content."""
    pattern = rf"{name}(-[a-z0-9]{{10}})?"
    (found,) = (each for each in manifests if each["kind"] == kind and re.fullmatch(pattern, each["metadata"]["name"]))
    return found


def pod(manifests: list[Manifest], kind: str, name: str) -> dict[str, Any]:
    spec: dict[str, Any] = find(manifests, kind, name)["spec"]["template"]["spec"]
    return spec


def container(manifests: list[Manifest], name: str, kind: str = "Deployment") -> dict[str, Any]:
    container: dict[str, Any] = pod(manifests, kind, name)["containers"][0]
    return container


def ray(manifests: list[Manifest]) -> dict[str, Any]:
    spec: dict[str, Any] = find(manifests, "RayService", "model")["spec"]
    return spec


def cluster(manifests: list[Manifest]) -> dict[str, Any]:
    cluster: dict[str, Any] = ray(manifests)["rayClusterConfig"]
    return cluster


def worker(manifests: list[Manifest]) -> dict[str, Any]:
    group: dict[str, Any] = cluster(manifests)["workerGroupSpecs"][0]
    return group


def serve(manifests: list[Manifest], change: Callable[[dict[str, Any]], object]) -> None:
    spec = ray(manifests)
    config = yaml.safe_load(spec["serveConfigV2"])
    change(config)
    spec["serveConfigV2"] = yaml.safe_dump(config)


def args(manifests: list[Manifest], **changes: Any) -> None:
    serve(manifests, lambda config: config["applications"][1]["args"].update(changes))


def data(manifests: list[Manifest], name: str) -> dict[str, str]:
    data: dict[str, str] = find(manifests, "ConfigMap", name)["data"]
    return data


def drop(manifests: list[Manifest], kind: str, name: str) -> None:
    manifests.remove(find(manifests, kind, name))


MISTAKES: dict[str, tuple[Mistake, str]] = {
    # Pods
    "root": (lambda m: pod(m, "Deployment", "proxy")["securityContext"].update(runAsNonRoot=False), "run as root"),
    "seccomp": (lambda m: pod(m, "Deployment", "ui")["securityContext"].pop("seccompProfile"), "seccomp"),
    "host network": (lambda m: pod(m, "Deployment", "ui").update(hostNetwork=True), "shares the node's namespaces"),
    "token": (lambda m: pod(m, "Deployment", "ui").update(automountServiceAccountToken=True), "automountService"),
    "head without token": (
        lambda m: cluster(m)["headGroupSpec"]["template"]["spec"].update(automountServiceAccountToken=False),
        "ray-head: automountServiceAccountToken",
    ),
    "default account": (lambda m: pod(m, "Deployment", "ui").pop("serviceAccountName"), "no ServiceAccount of its own"),
    "service links": (lambda m: pod(m, "Deployment", "proxy").pop("enableServiceLinks"), "service links"),
    "writable root": (
        lambda m: container(m, "proxy")["securityContext"].update(readOnlyRootFilesystem=False), "root file system",
    ),
    "capabilities": (lambda m: container(m, "ui")["securityContext"].pop("capabilities"), "capabilities"),
    "no CPU limit": (lambda m: container(m, "ui")["resources"]["limits"].pop("cpu"), "limits of CPU and memory"),
    "unbounded volume": (
        lambda m: pod(m, "Deployment", "ui")["volumes"][0].update(emptyDir={}), "without a bound",
    ),
    "latest": (lambda m: container(m, "ui").update(image="llm-lab/ui"), "without a version"),
    "another image": (lambda m: container(m, "ui").update(image="llm-lab/iu:dev"), "compose.yaml knows no image"),
    "namespace": (
        lambda m: find(m, "Namespace", "llm-lab")["metadata"]["labels"].clear(), "does not enforce `restricted`",
    ),
    # Probes
    "no liveness": (lambda m: container(m, "ui").pop("livenessProbe"), "not startup, readiness and liveness"),
    "probe's port": (
        lambda m: container(m, "ui")["livenessProbe"]["httpGet"].update(port="https"), "asks the port https",
    ),
    "probe's host": (
        lambda m: container(m, "proxy")["livenessProbe"]["httpGet"].pop("httpHeaders"), "refused without the Host name",
    ),
    "proxy waits for the model": (
        lambda m: container(m, "proxy")["readinessProbe"]["httpGet"].update(path="/ready"),
        "cached answers and /status",
    ),
    # References
    "twice": (lambda m: m.append(copy.deepcopy(find(m, "Service", "ui"))), "is there twice"),
    "unknown Secret": (
        lambda m: container(m, "proxy")["env"][0]["valueFrom"]["secretKeyRef"].update(key="admin"),
        "docs/kubernetes.md",
    ),
    "unknown ConfigMap": (
        lambda m: container(m, "ui")["envFrom"][0]["configMapRef"].update(name="iu"),
        "does not exist",
    ),
    "unused ConfigMap": (lambda m: container(m, "ui").pop("envFrom"), "is used by nothing"),
    "no volume": (lambda m: pod(m, "Deployment", "proxy")["volumes"].pop(), "does not exist"),
    "no label": (
        lambda m: find(m, "Deployment", "load")["metadata"]["labels"].clear(),
        "by which all of the lab is found",
    ),
    "elsewhere": (lambda m: find(m, "Service", "ui")["metadata"].update(namespace="default"), "lab's namespace"),
    # Services
    "selects nothing": (lambda m: find(m, "Service", "ui")["spec"]["selector"].update({SERVICE: "iu"}), "no pod"),
    "port": (lambda m: find(m, "Service", "proxy")["spec"]["ports"][0].update(port=80), "is not Deployment/proxy's"),
    "no Service": (lambda m: drop(m, "Service", "redis"), "Service redis with the port 6379"),
    "ingress": (
        lambda m: find(m, "Ingress", "ui")["spec"]["rules"][0].update(host="www.example"), "refuses the Host name",
    ),
    "budget": (
        lambda m: find(m, "PodDisruptionBudget", "ray-workers")["spec"]["selector"]["matchLabels"].update(
            {"ray.io/cluster": "model-x"}
        ),
        "changes at each upgrade",
    ),
    "no drain": (
        lambda m: find(m, "PodDisruptionBudget", "proxy")["spec"].update(minAvailable=2), "no node can be drained",
    ),
    # KEDA
    "scaled RayService": (
        lambda m: find(m, "ScaledObject", "proxy")["spec"]["scaleTargetRef"].update(kind="RayService", name="model"),
        "a RayService has no /scale",
    ),
    "metricName": (
        lambda m: find(m, "ScaledObject", "proxy")["spec"]["triggers"][0]["metadata"].update(metricName="x"),
        "metricName is gone",
    ),
    "no fallback": (lambda m: find(m, "ScaledObject", "proxy")["spec"].pop("fallback"), "no fallback"),
    "replicas": (lambda m: find(m, "Deployment", "proxy")["spec"].update(replicas=2), "resets the number of replicas"),
    # Variables
    "unknown variable": (lambda m: data(m, "proxy").update(PROXY_CASH_TTL="1"), "PROXY_CASH_TTL is no setting"),
    "wrong value": (lambda m: data(m, "proxy").update(PROXY_REQUIRE_KEYS="maybe"), "require_keys"),
    "not compose's": (lambda m: data(m, "ui").update(UI_PROXY_URL="http://proxy"), "in compose.yaml http://proxy:8080"),
    "no keys": (lambda m: data(m, "proxy").update(PROXY_REQUIRE_KEYS="false"), "answers callers without a key"),
    "files": (lambda m: data(m, "proxy").update(PROXY_FILES_ENABLED="false"), "PROXY_FILES_ENABLED"),
    # Redis
    "no password": (lambda m: container(m, "redis", "StatefulSet")["args"].__delitem__(slice(-2, None)), "no password"),
    "open password": (
        lambda m: container(m, "redis", "StatefulSet")["args"].__setitem__(-1, "secret"), "come from a Secret",
    ),
    "Ray's state may go": (
        lambda m: container(m, "redis-gcs", "StatefulSet")["args"].__setitem__(-3, "volatile-lru"), "not noeviction",
    ),
    # KubeRay
    "name": (lambda m: find(m, "RayService", "model")["metadata"].update(name="m" * 48), "at most 47 characters"),
    "upgrade": (lambda m: ray(m)["upgradeStrategy"].update(type="InPlace"), "does not exist"),
    "incremental": (
        lambda m: ray(m)["upgradeStrategy"].update(
            type="NewClusterWithIncrementalUpgrade",
            clusterUpgradeOptions={"gatewayClassName": "g", "stepSizePercent": 50, "maxSurgePercent": 25},
        ),
        "not between 1 and maxSurgePercent",
    ),
    "deleted early": (lambda m: ray(m).update(rayClusterDeletionDelaySeconds=60), "before the longest answer"),
    "ray version": (lambda m: cluster(m).update(rayVersion="2.40.0"), "rayVersion is not"),
    "no token": (lambda m: cluster(m).pop("authOptions"), "a token from a Secret"),
    "a gate": (lambda m: cluster(m).update(networkPolicy={}), "behind a gate"),
    "autoscaler": (lambda m: cluster(m)["autoscalerOptions"].pop("securityContext"), "`restricted` refuses"),
    "autoscaler v1": (lambda m: cluster(m)["autoscalerOptions"].update(version="v1"), "is not v2"),
    "one redis": (
        lambda m: cluster(m)["gcsFaultToleranceOptions"].update(redisAddress="redis:6379"), "a redis of its own",
    ),
    "replicas on the head": (
        lambda m: cluster(m)["headGroupSpec"]["rayStartParams"].pop("num-cpus"), "may land on the head",
    ),
    "restart": (lambda m: worker(m)["template"]["spec"].update(restartPolicy="Always"), "restartPolicy Never"),
    "labels": (
        lambda m: worker(m)["template"]["metadata"]["labels"].update({NODE_TYPE: "worker"}),
        "KubeRay's Services select",
    ),
    "shared memory": (
        lambda m: worker(m)["rayStartParams"].update({"object-store-memory": "4000000000"}), "do not fit",
    ),
    "KubeRay's probes": (
        lambda m: worker(m)["template"]["spec"]["containers"][0].pop("readinessProbe"), "need wget",
    ),
    "grace": (lambda m: worker(m)["template"]["spec"].update(terminationGracePeriodSeconds=30), "is killed before"),
    "ray stop": (
        lambda m: worker(m)["template"]["spec"]["containers"][0]["lifecycle"]["preStop"].update(
            exec={"command": ["ray", "stop"]}
        ),
        "streams are cut",
    ),
    "head's account": (lambda m: drop(m, "ServiceAccount", "ray-head"), "does not make a ServiceAccount"),
    "home": (lambda m: data(m, "ray").update(HOME="/home/lab"), "cannot be written"),
    "number of workers": (lambda m: worker(m).update(replicas=9), "outside minReplicas and maxReplicas"),
    # Serve
    "serve: unknown key": (
        lambda m: serve(m, lambda c: c["http_options"].update(prot=1)),
        "unknown key http_options.prot",
    ),
    "serve: wrong type": (lambda m: serve(m, lambda c: c["http_options"].update(port="x")), "serveConfigV2"),
    "serve: argument": (lambda m: args(m, thread=4), "takes no argument thread"),
    "serve: no CPU": (lambda m: args(m, cpus=0), "asks for no CPU"),
    "serve: too large": (lambda m: args(m, cpus=3), "wants 3.0 cpus, a worker has 2.0"),
    "serve: no GPU": (lambda m: args(m, device="cuda"), "a GPU that it does not ask for"),
    "serve: route": (
        lambda m: serve(m, lambda c: c["applications"][1].update(route_prefix="/chat")), "the proxy looks for",
    ),
    "serve: catalogue": (
        lambda m: serve(m, lambda c: c["applications"][0]["args"]["entries"][0].update(context=64)),
        "differs from its entry",
    ),
    "serve: port": (lambda m: serve(m, lambda c: c["http_options"].update(port=8001)), "the port of PROXY_MODEL_URL"),
}  # fmt: skip


def _without_default(manifests: list[Manifest]) -> None:
    """The default is for a pod without a policy of its own: here Ray's workers lose theirs, too."""
    for name in ("default-deny", "model", "traces", "traces-dns"):
        drop(manifests, "NetworkPolicy", name)


POLICIES: dict[str, tuple[Mistake, edges.Edge]] = {
    "no default": (_without_default, ("ray-worker", "internet", 443)),
    "no policy": (lambda m: drop(m, "NetworkPolicy", "redis"), ("proxy", "redis", 6379)),
    "any namespace": (
        lambda m: find(m, "NetworkPolicy", "proxy")["spec"]["ingress"][0].update({"from": [{"namespaceSelector": {}}]}),
        ("stranger", "proxy", 8080),
    ),
    "metadata": (
        lambda m: find(m, "NetworkPolicy", "proxy-to-internet")["spec"]["egress"][0]["to"][0]["ipBlock"].pop("except"),
        ("proxy", "metadata", 443),
    ),
    "all ports": (
        lambda m: find(m, "NetworkPolicy", "ray-head")["spec"]["ingress"][0].pop("ports"),
        ("kuberay", "ray-head", edges.ANY),
    ),
    "no way to DNS": (lambda m: find(m, "NetworkPolicy", "proxy")["spec"]["egress"].pop(), ("proxy", "dns", 53)),
    "Locust's port": (
        lambda m: find(m, "NetworkPolicy", "load")["spec"]["ingress"][0].pop("from"), ("internet", "load", 5557),
    ),
    "no way to the master": (
        lambda m: find(m, "NetworkPolicy", "load-worker")["spec"]["egress"].pop(0), ("load-worker", "load", 5557),
    ),
    "any collector": (
        lambda m: find(m, "NetworkPolicy", "traces")["spec"]["egress"][0].pop("to"), ("proxy", "internet", 4318),
    ),
    "no way to redis": (
        lambda m: find(m, "NetworkPolicy", "redis")["spec"]["ingress"].pop(), ("proxy", "redis", 6379),
    ),
}  # fmt: skip
