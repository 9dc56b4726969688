"""The manifests say what compose.yaml and the Settings classes say, are valid, and are as hardened."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import lab_model.settings
import lab_proxy.settings
import lab_ui.settings
import pytest
import yaml
from pydantic_settings import BaseSettings

BASE = Path(__file__).parents[2] / "k8s/base"
COMPOSE: dict[str, Any] = yaml.safe_load((BASE.parents[1] / "compose.yaml").read_text())
KUBERNETES = "1.37"
SETTINGS: dict[str, type[BaseSettings]] = {
    "ui": lab_ui.settings.Settings,
    "proxy": lab_proxy.settings.Settings,
    "model": lab_model.settings.Settings,
}
SERVICES = {name: settings.model_fields["port"].default for name, settings in SETTINGS.items()} | {"redis": 6379}
NETWORK = "llm-lab/"

Manifest = dict[str, Any]


def rendered() -> list[Manifest]:
    """What `kubectl kustomize` makes of the base, as far as the base uses kustomize: without kubectl the tests see it
    too. Generated names lack their hash."""
    plan = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    assert set(plan) == {"apiVersion", "kind", "namespace", "resources", "labels", "configMapGenerator"}
    manifests = [made for name in plan["resources"] for made in yaml.safe_load_all((BASE / name).read_text())]
    for generated in plan["configMapGenerator"]:
        data = dict(literal.split("=", 1) for literal in generated["literals"])
        metadata = {"name": generated["name"]}
        manifests.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    manifests = copy.deepcopy(manifests)  # YAML's anchors are one object each
    for made in manifests:
        if made["kind"] != "Namespace":
            made["metadata"]["namespace"] = plan["namespace"]
        for label in plan["labels"]:
            made["metadata"].setdefault("labels", {}).update(label["pairs"])
    return manifests


MANIFESTS = rendered()


def every(kind: str) -> dict[str, Manifest]:
    return {made["metadata"]["name"]: made for made in MANIFESTS if made["kind"] == kind}


def pod(name: str) -> Manifest:
    return dict(every("Deployment")[name]["spec"]["template"]["spec"])


def container(name: str) -> Manifest:
    (only,) = pod(name)["containers"]
    return dict(only)


def environment(name: str) -> dict[str, str | None]:
    """Variables of a container; None for what comes from a Secret."""
    given: dict[str, str | None] = {}
    for source in container(name).get("envFrom", []):
        given |= every("ConfigMap")[source["configMapRef"]["name"]]["data"]
    return given | {entry["name"]: entry.get("value") for entry in container(name).get("env", [])}


def unset(value: str) -> str:
    """A value of compose.yaml while none of the variables in it is set: the default of each ${NAME:-default}."""
    while (inner := re.sub(r"\$\{\w+:-([^{}]*)\}", r"\1", value)) != value:
        value = inner
    return value


def size(text: str) -> int:
    """Bytes of compose's 512m and 1g, of Kubernetes' 512Mi and 1Gi; the default of ${NAME:-default}."""
    text = re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", str(text)).lower().removesuffix("i")
    return int(text[:-1]) * {"m": 2**20, "g": 2**30}[text[-1]]


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not here; the other tests read the same manifests")
def test_kubectl_renders_the_same() -> None:
    done = subprocess.run(["kubectl", "kustomize", BASE], capture_output=True, text=True, check=True)
    told = done.stdout
    for name in every("ConfigMap"):
        told, count = re.subn(rf"\bname: {name}-[a-z0-9]{{10}}$", f"name: {name}", told, flags=re.M)
        assert count == 2, "made once, used once"

    def key(made: Mapping[str, Any]) -> tuple[str, str]:
        return made["kind"], made["metadata"]["name"]

    assert sorted(yaml.safe_load_all(told), key=key) == sorted(MANIFESTS, key=key)


@pytest.mark.parametrize("made", MANIFESTS, ids=lambda made: f"{made['kind']}-{made['metadata']['name']}")
def test_manifests_are_valid(made: Manifest) -> None:
    """Against Kubernetes' own schema, unknown fields refused."""
    kubernetes_validate.validate(made, KUBERNETES, strict=True)


def test_services_and_ports_are_those_of_compose_and_settings() -> None:
    always = {name for name, service in COMPOSE["services"].items() if not service.get("profiles")}
    assert set(every("Deployment")) == set(every("Service")) == always == set(SERVICES)
    for name, port in SERVICES.items():
        (offered,) = every("Service")[name]["spec"]["ports"]
        (open_,) = container(name)["ports"]
        assert offered["port"] == open_["containerPort"] == port
        assert offered["targetPort"] == open_["name"]
        for published in COMPOSE["services"][name].get("ports", []):
            assert published.endswith(f":{port}")
        template = every("Deployment")[name]["spec"]["template"]["metadata"]["labels"]
        selected = every("Service")[name]["spec"]["selector"]
        assert selected == every("Deployment")[name]["spec"]["selector"]["matchLabels"]
        assert selected.items() <= template.items()
    assert {made["metadata"]["namespace"] for made in MANIFESTS if made["kind"] != "Namespace"} == {COMPOSE["name"]}
    assert list(every("Namespace")) == [COMPOSE["name"]]


@pytest.mark.parametrize("name", SETTINGS)
def test_variables_are_those_of_compose_and_settings(name: str) -> None:
    """Each is a field of the class, and of compose.yaml with the same value, where compose.yaml gives one."""
    given = environment(name)
    fields = {f"{name.upper()}_{field.upper()}" for field in SETTINGS[name].model_fields}
    assert set(given) <= fields
    composed: dict[str, Any] = COMPOSE["services"][name]["environment"]
    fixed = {key: unset(value) for key, value in composed.items() if value}
    # Catalogue, routes and prices are the image's own. A key comes from a Secret, which may be missing; a file may not.
    files = {"MODEL_CATALOGUE_FILE", "PROXY_ROUTES_FILE", "PROXY_PRICES_FILE"}
    elsewhere = files | {"PROXY_OPENAI_API_KEY_FILE", "PROXY_ADMIN_KEY_FILE"}
    assert {key: given.get(key) for key in fixed if key not in elsewhere} == {
        key: value for key, value in fixed.items() if key not in elsewhere
    }
    assert set(given) - set(composed) <= {"PROXY_OPENAI_API_KEY", "PROXY_ADMIN_KEY"}
    SETTINGS[name](**{key.removeprefix(f"{name.upper()}_").lower(): value for key, value in given.items() if value})


def test_the_keys_are_optional() -> None:
    for key in container("proxy")["env"]:
        source = key["valueFrom"]["secretKeyRef"]
        assert source["optional"] is True
        assert source["key"] in COMPOSE["services"]["proxy"]["secrets"]


def test_images_are_those_that_compose_builds() -> None:
    for name in SETTINGS:
        tag = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE["services"][name]["image"])
        assert container(name)["image"] == tag
    built = COMPOSE["services"]["redis"]["build"]["dockerfile_inline"]
    assert f"FROM {container('redis')['image']}\n" in built


def test_redis_runs_with_the_same_arguments() -> None:
    composed = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE["services"]["redis"]["command"]).split()
    assert [argument or '""' for argument in container("redis")["args"]] == composed
    assert container("redis")["command"] == COMPOSE["services"]["redis"]["entrypoint"]


@pytest.mark.parametrize("name", SERVICES)
def test_hardening_and_bounds_are_those_of_compose(name: str) -> None:
    inside, outside = container(name)["securityContext"], pod(name)["securityContext"]
    assert inside == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert outside["runAsNonRoot"] is True
    assert outside["runAsUser"] > 0
    assert outside["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod(name)["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod(name))

    composed = COMPOSE["services"][name]
    assert size(container(name)["resources"]["limits"]["memory"]) == size(composed["mem_limit"])
    if "stop_grace_period" in composed:
        assert f"{pod(name)['terminationGracePeriodSeconds']}s" == composed["stop_grace_period"]
    mounted = {mount["mountPath"]: mount["name"] for mount in container(name)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod(name)["volumes"]}
    assert set(mounted.values()) == set(volumes)
    assert "emptyDir" in volumes[mounted["/tmp"]]  # noqa: S108 the container's
    for volume in composed.get("volumes", []):
        if isinstance(volume, str) and "/" not in volume.split(":")[0]:
            claim = volumes[mounted[volume.split(":")[1]]]["persistentVolumeClaim"]["claimName"]
            assert claim == volume.split(":")[0]
            assert claim in every("PersistentVolumeClaim")


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_named_like_a_prefix_sets_no_variable(name: str) -> None:
    """Kubernetes would set PROXY_PORT=tcp://10.0.0.1:8080 in every pod, for a Service named proxy."""
    assert pod(name)["enableServiceLinks"] is False


@pytest.mark.parametrize(("name", "path"), [("ui", "/_stcore/health"), ("proxy", "/ready"), ("model", "/ready")])
def test_probes_mean_readiness(name: str, path: str) -> None:
    """As compose's healthchecks do, under a Host name that the service takes: a kubelet would say the pod's address."""
    probes = {kind: container(name)[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    assert probes["readiness"]["path"] == path
    assert path in (BASE.parents[1] / f"services/{name}/Dockerfile").read_text()
    assert probes["liveness"]["path"] == (path if name == "ui" else "/health"), (
        "a model that loads is no reason to kill"
    )
    for probe in probes.values():
        if name != "model":
            assert probe["httpHeaders"] == [{"name": "Host", "value": name}]


def test_the_model_may_load_as_long_as_it_says() -> None:
    probe = container("model")["startupProbe"]
    allowed = SETTINGS["model"].model_fields["start_timeout_seconds"].default
    assert probe["periodSeconds"] * probe["failureThreshold"] >= allowed


def test_redis_is_ready_when_it_answers() -> None:
    assert (
        container("redis")["readinessProbe"]["exec"]["command"][-1]
        == COMPOSE["services"]["redis"]["healthcheck"]["test"][1]
    )


def test_networks_are_those_of_compose() -> None:
    """Who is in which; front and back speak among themselves; back has no way out, proxy alone has one."""
    policies = every("NetworkPolicy")
    for name in SERVICES:
        labels = every("Deployment")[name]["spec"]["template"]["metadata"]["labels"]
        assert {label.removeprefix(NETWORK) for label in labels if label.startswith(NETWORK)} == set(
            COMPOSE["services"][name]["networks"]
        )
    for network in COMPOSE["networks"]:
        policy = policies[network]["spec"]
        inside = {"podSelector": {"matchLabels": {f"{NETWORK}{network}": "true"}}}
        assert policy["podSelector"] == inside["podSelector"]
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        assert [rule["from"] for rule in policy["ingress"]] == [[inside]]
        assert policy["egress"][0]["to"] == [inside]
    assert COMPOSE["networks"]["back"]["internal"] is True
    assert len(policies["back"]["spec"]["egress"]) == 1
    (ingress,) = policies["back"]["spec"]["ingress"]
    assert {rule["port"] for rule in ingress["ports"]} == {SERVICES["model"], SERVICES["redis"]}
    assert policies["none"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert policies["out"]["spec"]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "proxy"}
    assert set(policies) == {"none", "front", "back", "out"}
