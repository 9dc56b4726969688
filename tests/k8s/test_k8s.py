"""The manifests of k8s/: valid for the API server and KubeRay, hardened, in agreement with compose.yaml and Settings.

Every overlay and every sensible combination of model and components is rendered by kubectl and checked by the rules of
rules.py; each kind of mistake that a rule is for is planted once, and must be found.
"""

from __future__ import annotations

import copy
from pathlib import Path

import edges
import mistakes
import pytest
import rules
import schemas
import yaml
from lab_model.models.catalogue import AppArgs, load_catalogue
from lab_model.serving.cluster_app import ClusterArgs
from lab_model.serving.deploy import serve_config
from lab_model.serving.ray_internals import prepare_environment
from lab_model.settings import Settings as ModelSettings
from lab_proxy.settings import Settings as ProxySettings
from lab_proxy.upstreams.routes import Routes
from manifests import COMPOSE, K8S, ROOT, combinations, kubectl, of_kind, parts, rendered
from ray.serve.schema import ServeDeploySchema

needs_kubectl = pytest.mark.skipif(
    kubectl() is None, reason="kubectl from 1.27 on is not here: it renders k8s/ (Debian 13 has 1.32)"
)
needs_crds = pytest.mark.skipif(
    schemas.CRDS is None, reason="KUBERAY_CRDS names no folder with KubeRay's CRDs (ray-operator/config/crd/bases)"
)
COMBINATIONS = dict(combinations())


@needs_kubectl
@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_combination_is_valid_and_keeps_all_rules(name: str) -> None:
    """The API server takes it, the rules find nothing, and its policies allow what the table says and nothing else."""
    manifests = rendered(*COMBINATIONS[name])
    assert [fault for made in manifests for fault in schemas.faults(made)] == []
    assert rules.complaints(manifests) == []
    allowed, wanted = edges.allowed(manifests), edges.wanted(parts(COMBINATIONS[name]), manifests)
    assert (sorted(allowed - wanted), sorted(wanted - allowed)) == ([], [])


# -- planted mistakes


@needs_kubectl
@pytest.mark.parametrize("name", mistakes.MISTAKES)
def test_a_planted_mistake_is_found(name: str) -> None:
    plant, words = mistakes.MISTAKES[name]
    manifests = list(copy.deepcopy(rendered(*COMBINATIONS["rayservice+all"])))
    if name == "serve: no GPU":
        manifests = list(copy.deepcopy(rendered(*COMBINATIONS["rayservice+files"])))
    elif name == "serve: too large":
        manifests = list(copy.deepcopy(rendered(*COMBINATIONS["rayservice+redis-gcs"])))
    plant(manifests)
    found = rules.complaints(tuple(manifests))
    assert any(words in line for line in found), found


@needs_kubectl
@pytest.mark.parametrize("name", mistakes.POLICIES)
def test_a_wrong_policy_is_found(name: str) -> None:
    """The edge that is there too much, or missing."""
    plant, edge = mistakes.POLICIES[name]
    combination = COMBINATIONS["rayservice+all"]
    manifests = list(copy.deepcopy(rendered(*combination)))
    plant(manifests)
    changed = edges.allowed(tuple(manifests)) ^ edges.wanted(parts(combination), tuple(manifests))
    assert edge in changed


@needs_crds
def test_kuberays_own_samples_are_valid() -> None:
    """The validator is no stricter than the API server: all of the operator's samples pass."""
    assert schemas.CRDS is not None
    folder = next(each for each in (schemas.CRDS / "samples", schemas.CRDS / "../../samples") if each.is_dir())
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    documents = [
        made
        for path in sorted(folder.glob("*.yaml"))
        for made in yaml.load_all(path.read_text(), Loader=loader)
        if made and made["kind"] in {"RayService", "RayCluster"}
    ]
    assert len(documents) >= 62
    assert [fault for made in documents for fault in schemas.faults(made)] == []


@needs_kubectl
@needs_crds
@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (lambda m: mistakes.ray(m).update(serveConfigv2=""), "serveConfigv2"),
        (lambda m: mistakes.cluster(m)["headGroupSpec"].pop("template"), "template"),
        (lambda m: mistakes.worker(m).update(minReplicas="2"), "minReplicas"),
        (lambda m: mistakes.cluster(m)["autoscalerOptions"].update(idleTimeoutSecond=1), "idleTimeoutSecond"),
        (lambda m: mistakes.worker(m)["template"]["spec"]["containers"][0].update(imag="x"), "imag"),
        (lambda m: mistakes.worker(m)["template"]["spec"]["containers"][0].pop("name"), "name"),
    ],
    ids=["field", "missing", "type", "deep field", "pod field", "pod missing"],
)
def test_a_typo_in_a_rayservice_is_refused(plant: mistakes.Mistake, words: str) -> None:
    manifests = list(copy.deepcopy(rendered(*COMBINATIONS["cpu"])))
    plant(manifests)
    assert any(words in fault for made in manifests for fault in schemas.faults(made))


@needs_kubectl
@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (lambda m: mistakes.container(m, "ui").update(imagePullpolicy="Always"), "imagePullpolicy"),
        (lambda m: mistakes.find(m, "ScaledObject", "ui")["spec"].update(coolDownPeriod=1), "coolDownPeriod"),
        (
            lambda m: mistakes.find(m, "ScaledObject", "ui")["spec"]["triggers"][0]["metadata"].update(value=3),
            "3 is not",
        ),
    ],
    ids=["Deployment", "ScaledObject", "its metadata"],
)
def test_a_typo_in_another_manifest_is_refused(plant: mistakes.Mistake, words: str) -> None:
    manifests = list(copy.deepcopy(rendered(*COMBINATIONS["cpu"])))
    plant(manifests)
    assert any(words in fault for made in manifests for fault in schemas.faults(made))


# -- files that manifests carry


def test_carried_files_are_good() -> None:
    """The catalogue of `weights` and the routes of `external-model` are read as their services read them."""
    assert any(entry.source.startswith("hub:") for entry in load_catalogue(K8S / "components/weights/models.yaml"))
    settings = ProxySettings(routes_file=K8S / "components/external-model/routes.yaml")
    assert Routes(settings).upstreams["model"].native is False


def test_the_cluster_serves_the_packaged_catalogue() -> None:
    """Both Serve configurations: the same models as on one machine, and the GPU's differs in devices alone."""
    packaged = {entry.id: entry for entry in load_catalogue(None)}
    for place in ("model/rayservice", "components/gpu"):
        config = yaml.safe_load((K8S / place / "serve.yaml").read_text())
        entries = {each["id"]: each for each in config["applications"][0]["args"]["entries"]}
        assert set(entries) == set(packaged)
        for name, entry in entries.items():
            assert {key: entry[key] for key in ("kind", "source")} == {
                key: getattr(packaged[name], key) for key in ("kind", "source")
            }


@needs_kubectl
def test_rays_variables_are_those_of_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Except those of the log, which goes to a pipe on one machine."""
    given = mistakes.data(list(rendered(*COMBINATIONS["rayservice+files"])), "ray")
    for name in given:
        monkeypatch.delenv(name, raising=False)
    environ: dict[str, str] = {}
    monkeypatch.setattr("os.environ", environ)
    prepare_environment(direct=False)
    own = {"RAY_LOG_TO_STDERR", "RAY_BACKEND_LOG_LEVEL", "HOME"}
    assert {name: value for name, value in given.items() if name not in own} == {
        name: environ.get(name) for name in given if name not in own
    }


def test_the_config_of_a_catalogue_is_one_that_serve_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m lab_model.serving.deploy`: of the entries of serve.yaml it makes the applications of serve.yaml."""
    manifest = yaml.safe_load((K8S / "model/rayservice/serve.yaml").read_text())
    wanted = manifest["applications"]
    lines = [*wanted[0]["args"]["entries"], {"id": "later", "kind": "chat", "source": "file:/x", "load": "demand"}]
    (tmp_path / "models.yaml").write_text(yaml.safe_dump(lines))
    given = {"HOST": "0.0.0.0", "DEVICE": "cpu", "DRAIN_TIMEOUT_SECONDS": "600", "KV_TOKENS": "4096"}
    for name, value in given.items():
        monkeypatch.setenv(f"MODEL_{name}", value)
    made = serve_config(ModelSettings(), load_catalogue(tmp_path / "models.yaml"))
    assert list(rules.unknown_keys(made, ServeDeploySchema)) == []
    ServeDeploySchema.model_validate(made)
    assert made["http_options"] == manifest["http_options"]
    assert made["logging_config"] == manifest["logging_config"]
    for own, theirs in zip(made["applications"], wanted, strict=True):
        assert {key: own[key] for key in own if key != "args"} == {key: theirs[key] for key in theirs if key != "args"}
    assert ClusterArgs.model_validate(made["applications"][0]["args"]) == ClusterArgs.model_validate(wanted[0]["args"])
    chat = AppArgs.model_validate(wanted[1]["args"]).model_copy(update={"kv_tokens": 4096})
    assert AppArgs.model_validate(made["applications"][1]["args"]) == chat


@needs_kubectl
def test_weights_are_fetched_as_in_compose() -> None:
    job = mistakes.container(list(rendered(*COMBINATIONS["deployment+weights"])), "weights", "Job")
    assert job["command"] == COMPOSE["services"]["weights"]["entrypoint"]


@needs_kubectl
def test_load_goes_to_the_proxy_with_a_key() -> None:
    """components/load puts load on what compose.yaml's does, with a key."""
    manifests = list(rendered(*COMBINATIONS["deployment+load"]))
    given = rules.environment(next(p for p in rules.pods(tuple(manifests)) if p.service == "load"), tuple(manifests))
    assert given["LOAD_HOST"] == rules.unset(COMPOSE["services"]["load"]["environment"]["LOAD_HOST"])
    assert given["LOAD_API_KEY"] is None, "from a Secret"


def test_probes_of_compose_and_kubernetes_ask_the_same_pages() -> None:
    """The images' health checks; the proxy's pods are ready without the model, compose's start order wants both."""
    for service, path in {"ui": "/_stcore/health", "model": "/ready"}.items():
        assert path in (ROOT / f"services/{service}/Dockerfile").read_text()
    assert list(of_kind(tuple(yaml.safe_load_all((K8S / "base/proxy.yaml").read_text())), "Deployment")) == ["proxy"]
