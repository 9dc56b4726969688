"""The manifests of k8s/ as kubectl renders them: every overlay, and every sensible combination of components."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

K8S = Path(__file__).parents[2] / "k8s"
ROOT = K8S.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICE = "llm-lab/service"
NODE_TYPE = "ray.io/node-type"
KUBECTL_VERSION = (1, 27)  # the first whose kustomize is 5: `replacements` and `labels` as they are used here

Manifest = dict[str, Any]

# What goes with which model. keda reads the Prometheus of monitoring; redis-gcs is Ray's.
ANY = ("files", "ingress", "load", "monitoring", "openai-key", "traces")
COMPONENTS = {
    "model/deployment": (*ANY, "gpu", "weights"),
    "model/rayservice": (*ANY, "gpu", "weights", "redis-gcs"),
    "components/external-model": ANY,
}


def combinations() -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name, the folders below k8s/ that it is made of). An overlay is one folder."""
    for overlay in sorted((K8S / "overlays").iterdir()):
        yield overlay.name, (f"overlays/{overlay.name}",)
    for model, fitting in COMPONENTS.items():
        name = model.partition("/")[2]
        for component in fitting:
            yield f"{name}+{component}", ("base", model, f"components/{component}")
        every = [f"components/{each}" for each in (*fitting, "keda")]
        yield f"{name}+all", ("base", model, *every)


def parts(folders: tuple[str, ...]) -> set[str]:
    """The model and the components of a combination, also through its overlays."""
    found = set()
    for folder in folders:
        if folder.startswith("overlays/"):
            plan = yaml.safe_load((K8S / folder / "kustomization.yaml").read_text())
            named = [*plan["resources"], *plan.get("components", [])]
            below = [os.path.normpath(f"{folder}/{each}") for each in named]
            found |= parts(tuple(below))
        elif folder != "base":
            found.add(folder.rpartition("/")[2])
    return found


def kubectl() -> str | None:
    """kubectl, if it is new enough to render k8s/ (Debian 12's is not)."""
    found = shutil.which("kubectl")
    if found is None:
        return None
    told = subprocess.run([found, "version", "--client", "-o", "yaml"], capture_output=True, text=True, check=False)
    version = (yaml.safe_load(told.stdout) or {}).get("clientVersion", {}) if told.returncode == 0 else {}
    numbers = (int(version.get("major") or 0), int(str(version.get("minor") or 0).rstrip("+")))
    return found if numbers >= KUBECTL_VERSION else None


@functools.cache
def rendered(*folders: str) -> tuple[Manifest, ...]:
    """What `kubectl kustomize` makes of these folders below k8s/. The caller must not change it."""
    program = kubectl()
    assert program
    if len(folders) == 1:
        return _documents(program, K8S / folders[0])
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.relpath(K8S / each, Path(folder).resolve()) for each in folders]
        parts: dict[str, list[str]] = {"resources": [], "components": []}
        for path in paths:
            parts["components" if "/components/" in path else "resources"].append(path)
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(parts))
        return _documents(program, Path(folder))


def _documents(program: str, folder: Path) -> tuple[Manifest, ...]:
    done = subprocess.run([program, "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.load_all(done.stdout, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


@dataclass(frozen=True)
class Pod:
    """A pod template. `name`: kind and name of what owns it; `service`: the value of its label llm-lab/service."""

    name: str
    service: str
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def pods(manifests: tuple[Manifest, ...]) -> list[Pod]:
    """Every pod template, those of Ray's nodes with the label that KubeRay adds."""
    found = []
    for made in manifests:
        kind, name = made["kind"], made["metadata"]["name"]
        if kind == "RayService":
            cluster = made["spec"]["rayClusterConfig"]
            groups = [("head", cluster["headGroupSpec"])]
            groups += [("worker", group) for group in cluster["workerGroupSpecs"]]
            for node, group in groups:
                template = group["template"]
                labels = template["metadata"]["labels"] | {NODE_TYPE: node}
                found.append(Pod(f"ray-{node}", labels.get(SERVICE, ""), labels, template["spec"]))
        elif kind in {"Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob"}:
            spec = made["spec"]["jobTemplate"]["spec"] if kind == "CronJob" else made["spec"]
            labels = spec["template"]["metadata"].get("labels", {})
            found.append(Pod(f"{kind}/{name}", labels.get(SERVICE, ""), labels, spec["template"]["spec"]))
    return found


def of_kind(manifests: tuple[Manifest, ...], kind: str) -> dict[str, Manifest]:
    return {made["metadata"]["name"]: made for made in manifests if made["kind"] == kind}


def selects(selector: dict[str, Any] | None, labels: dict[str, str]) -> bool:
    """A Kubernetes label selector. None selects nothing, {} everything."""
    if selector is None:
        return False
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for rule in selector.get("matchExpressions", []):
        value, values = labels.get(rule["key"]), rule.get("values", [])
        fits = {
            "In": value in values, "NotIn": value not in values, "Exists": value is not None,
            "DoesNotExist": value is None,
        }[rule["operator"]]  # fmt: skip
        if not fits:
            return False
    return True


def environment(pod: Pod, manifests: tuple[Manifest, ...]) -> dict[str, str | None]:
    """Variables of a pod's first container; None for a value from a Secret."""
    given: dict[str, str | None] = {}
    (container, *_) = pod.spec["containers"]
    maps = of_kind(manifests, "ConfigMap")
    for source in container.get("envFrom", []):
        given |= maps.get(source["configMapRef"]["name"], {}).get("data", {})
    return given | {entry["name"]: entry.get("value") for entry in container.get("env", [])}
