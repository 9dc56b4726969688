"""What schemas cannot say about the manifests: each function returns one line for each fault.

KubeRay's rules are those of its 1.7 operator, which refuses or silently misbehaves where a CRD is content.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import lab_load.settings
import lab_model.settings
import lab_proxy.settings
import lab_ui.settings
import yaml
from lab_model.models.catalogue import AppArgs
from lab_model.serving.cluster_app import ClusterArgs
from lab_model.serving.ray_internals import CHECKED_RAY
from manifests import COMPOSE, NODE_TYPE, ROOT, SERVICE, Manifest, Pod, environment, of_kind, pods, selects
from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings
from ray.serve.schema import ServeDeploySchema

Manifests = tuple[Manifest, ...]

SETTINGS: dict[str, type[BaseSettings]] = {
    "ui": lab_ui.settings.Settings,
    "proxy": lab_proxy.settings.Settings,
    "model": lab_model.settings.Settings,
    "load": lab_load.settings.Settings,
}
PORTS = {name: settings.model_fields["port"].default for name, settings in SETTINGS.items()} | {"redis": 6379}
LONGEST_ANSWER = lab_proxy.settings.Settings.model_fields["total_timeout_seconds"].default
SECRET_LINE = re.compile(r"create secret generic (\S+) (.+)$", re.M)
NO_ACCOUNT = {"", "default"}


def documented_secrets() -> dict[str, set[str]]:
    """Secret -> its keys, from the commands of docs/kubernetes.md."""
    text = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")
    found = {
        name: set(re.findall(r"--from-(?:literal|file)=([a-z_]+)=", rest)) for name, rest in SECRET_LINE.findall(text)
    }
    assert len(found) > 4, "docs/kubernetes.md creates the Secrets"
    return found


# -- every pod


def hardening(manifests: Manifests) -> Iterator[str]:
    """Pod Security `restricted` and more: read-only, bounded, without a token. Ray's autoscaler alone has one."""
    for pod in pods(manifests):
        spec, context = pod.spec, pod.spec.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
            yield f"{pod.name}: may run as root"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{pod.name}: no seccomp profile"
        if {"hostNetwork", "hostPID", "hostIPC"} & set(spec):
            yield f"{pod.name}: shares the node's namespaces"
        if spec.get("automountServiceAccountToken") is not (pod.name == "ray-head"):
            yield f"{pod.name}: automountServiceAccountToken"
        if spec.get("serviceAccountName", "default") in NO_ACCOUNT:
            yield f"{pod.name}: no ServiceAccount of its own"
        if spec.get("enableServiceLinks") is not False:  # PROXY_PORT=tcp://… for a Service named proxy
            yield f"{pod.name}: service links"
        if not pod.service:
            yield f"{pod.name}: no label {SERVICE}, so no policy selects it"
        for volume in spec.get("volumes", []):
            if "hostPath" in volume:
                yield f"{pod.name}: a folder of the node"
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{pod.name}: volume {volume['name']} without a bound"
        for container in pod.containers:
            yield from _container(pod, container)
    for name, account in of_kind(manifests, "ServiceAccount").items():
        if account.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount {name}: mounts its token"
    for made in of_kind(manifests, "Namespace").values():
        if made["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
            yield "the namespace does not enforce `restricted`"
    for kind in ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"):
        for name in of_kind(manifests, kind):
            yield f"{kind} {name}: nothing of the lab needs one; KubeRay makes its own"


def _container(pod: Pod, container: dict[str, Any]) -> Iterator[str]:
    where, context = f"{pod.name}/{container['name']}", container.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
        yield f"{where}: privileges"
    if context.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{where}: capabilities"
    if context.get("readOnlyRootFilesystem") is not True:
        yield f"{where}: root file system can be written"
    for what in ("requests", "limits"):
        if not {"cpu", "memory"} <= set(container.get("resources", {}).get(what, {})):
            yield f"{where}: {what} of CPU and memory"
    if not re.search(r":[\w.-]+$", container["image"]) or container["image"].endswith(":latest"):
        yield f"{where}: image {container['image']} without a version"
    mounted = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
    if "/tmp" not in mounted and pod.service != "prometheus":  # noqa: S108 the container's
        yield f"{where}: no /tmp that can be written"


def probes(manifests: Manifests) -> Iterator[str]:
    """All that run for long have all three; Host names are those that the services take."""
    for pod in pods(manifests):
        for container in pod.spec["containers"]:
            where = f"{pod.name}/{container['name']}"
            named = {port["name"] for port in container.get("ports", [])}
            kinds = [kind for kind in ("startup", "readiness", "liveness") if f"{kind}Probe" in container]
            if pod.name.startswith("Job/") or not named:  # what listens to nothing has nothing to ask
                continue
            if len(kinds) < 3:
                yield f"{where}: has {', '.join(kinds) or 'no'} probes, not startup, readiness and liveness"
            for kind in kinds:
                probe = container[f"{kind}Probe"]
                how = probe.get("httpGet") or probe.get("tcpSocket") or {}
                if how and how["port"] not in named:
                    yield f"{where}: {kind} probe asks the port {how['port']}, which it has not"
                hosts = [header["value"] for header in how.get("httpHeaders", []) if header["name"] == "Host"]
                if "httpGet" in probe and pod.service in {"ui", "proxy", "load"} and hosts != [pod.service]:
                    yield f"{where}: {kind} probe is refused without the Host name {pod.service}"
            readiness = container.get("readinessProbe", {}).get("httpGet", {}).get("path")
            if pod.service == "proxy" and readiness != "/health":
                yield f"{where}: readiness asks {readiness}: with the model down cached answers and /status vanish"
            startup = container.get("startupProbe", {})
            allowed = lab_model.settings.Settings.model_fields["start_timeout_seconds"].default
            if pod.name == "Deployment/model":
                if startup.get("periodSeconds", 10) * startup.get("failureThreshold", 3) < allowed:
                    yield f"{where}: is killed before MODEL_START_TIMEOUT_SECONDS"
                if container["livenessProbe"]["httpGet"]["path"] != "/health":
                    yield f"{where}: a model that loads is no reason to kill"


def references(manifests: Manifests) -> Iterator[str]:
    """Everything that is named exists, and everything that exists is used."""
    names = Counter((made["kind"], made["metadata"]["name"]) for made in manifests)
    yield from (f"{kind} {name} is there twice" for (kind, name), count in names.items() if count > 1)
    secrets, accounts = documented_secrets(), of_kind(manifests, "ServiceAccount")
    maps, claims = of_kind(manifests, "ConfigMap"), of_kind(manifests, "PersistentVolumeClaim")
    used: set[tuple[str, str]] = set()
    for made in manifests:
        if made["metadata"].get("namespace") not in ({None} if made["kind"] == "Namespace" else {COMPOSE["name"]}):
            yield f"{made['kind']} {made['metadata']['name']}: not in the lab's namespace"
        if made["metadata"].get("labels", {}).get("app.kubernetes.io/part-of") != COMPOSE["name"]:
            yield f"{made['kind']} {made['metadata']['name']}: without the label by which all of the lab is found"
    for place, value in _fields(list(manifests)):
        key = place.rpartition(".")[2]
        if key == "secretKeyRef":
            if value["key"] not in secrets.get(value["name"], set()):
                yield f"Secret {value['name']} with the key {value['key']} is not in docs/kubernetes.md"
        elif key == "configMapRef" or (key == "configMap" and isinstance(value, dict)):
            used.add(("ConfigMap", value["name"]))
            if value["name"] not in maps:
                yield f"ConfigMap {value['name']} does not exist"
        elif key == "persistentVolumeClaim":
            used.add(("PersistentVolumeClaim", value["claimName"]))
            if value["claimName"] not in claims:
                yield f"PersistentVolumeClaim {value['claimName']} does not exist"
    for pod in pods(manifests):
        account = pod.spec.get("serviceAccountName", "default")
        used.add(("ServiceAccount", account))
        if account not in accounts:
            yield f"{pod.name}: ServiceAccount {account} does not exist"
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        for made in manifests:
            if f"{made['kind']}/{made['metadata']['name']}" == pod.name:
                templates = made["spec"].get("volumeClaimTemplates", [])
                volumes |= {claim["metadata"]["name"]: {} for claim in templates}
        mounts = [mount["name"] for container in pod.containers for mount in container.get("volumeMounts", [])]
        yield from (f"{pod.name}: volume {name} does not exist" for name in set(mounts) - set(volumes))
        yield from (f"{pod.name}: volume {name} is not mounted" for name in set(volumes) - set(mounts))
        for volume in volumes.values():
            if "secret" in volume:
                keys = {item["key"] for item in volume["secret"].get("items", [])}
                if not keys or not keys <= secrets.get(volume["secret"]["secretName"], set()):
                    yield f"Secret {volume['secret']['secretName']} with {keys} is not in docs/kubernetes.md"
    for kind, made in (("ConfigMap", maps), ("PersistentVolumeClaim", claims), ("ServiceAccount", accounts)):
        yield from (f"{kind} {name} is used by nothing" for name in made if (kind, name) not in used)


def _fields(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield f"{place}.{key}", each
            yield from _fields(each, f"{place}.{key}")
    elif isinstance(value, list):
        for each in value:
            yield from _fields(each, place)


def services(manifests: Manifests) -> Iterator[str]:
    """Services, ingresses, budgets, scalers: each leads to something that is there, under compose's names and ports."""
    running = pods(manifests)
    made = of_kind(manifests, "Service")
    ports: dict[str, set[int | str]] = {}
    for name, service in made.items():
        spec = service["spec"]
        if spec.get("type") == "ExternalName":
            ports[name] = {PORTS[name]}
            continue
        chosen = [pod for pod in running if selects({"matchLabels": spec["selector"]}, pod.labels)]
        if not chosen:
            yield f"Service {name} selects no pod"
        for port in spec["ports"]:
            ports.setdefault(name, set()).update({port["port"], port["name"]})
            for pod in chosen:
                offered = {p["name"]: p["containerPort"] for each in pod.spec["containers"] for p in each["ports"]}
                if offered.get(port["targetPort"]) != port["port"]:
                    yield f"Service {name}: port {port['port']} is not {pod.name}'s {port['targetPort']}"
    for rays in of_kind(manifests, "RayService").values():
        named = rays["spec"]["serveService"]
        ports[named["metadata"]["name"]] = {port["port"] for port in named["spec"]["ports"]}
    for name in ("ui", "proxy", "model", "redis"):
        if PORTS[name] not in ports.get(name, set()):
            yield f"Service {name} with the port {PORTS[name]} of its Settings does not exist"
    for pod in running:
        if pod.service in PORTS and not any(pod.name.startswith(kind) for kind in ("ray-", "Job/")):
            (container,) = pod.spec["containers"]
            if PORTS[pod.service] not in {port["containerPort"] for port in container["ports"]}:
                yield f"{pod.name}: does not offer the port {PORTS[pod.service]} of its Settings"
    for name, ingress in of_kind(manifests, "Ingress").items():
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                target = path["backend"]["service"]
                if target["port"]["name"] not in ports.get(target["name"], set()):
                    yield f"Ingress {name}: Service {target['name']} has no port {target['port']['name']}"
            hosts = [host for tls in ingress["spec"].get("tls", []) for host in tls["hosts"]]
            if rule["host"] not in hosts:
                yield f"Ingress {name}: {rule['host']} without TLS"
            allowed = environment(_pod(running, name), manifests).get(f"{name.upper()}_ALLOWED_HOSTS")
            if rule["host"] not in str(allowed).split(","):
                yield f"Ingress {name}: {name} refuses the Host name {rule['host']}"
    for name, budget in of_kind(manifests, "PodDisruptionBudget").items():
        chosen = [pod for pod in running if selects(budget["spec"]["selector"], pod.labels)]
        if "ray.io/cluster" in str(budget["spec"]["selector"]):
            yield f"PodDisruptionBudget {name}: ray.io/cluster changes at each upgrade"
        if len(chosen) != 1:
            yield f"PodDisruptionBudget {name} selects {len(chosen)} kinds of pods"
        replicas = of_kind(manifests, "Deployment").get(name, {}).get("spec", {}).get("replicas", 2)
        if budget["spec"].get("minAvailable", 0) >= replicas:
            yield f"PodDisruptionBudget {name}: no node can be drained"
    for name, scaler in of_kind(manifests, "ScaledObject").items():
        yield from _scaler(name, scaler, manifests, ports)


def _pod(running: list[Pod], service: str) -> Pod:
    return next(pod for pod in running if pod.service == service)


def _scaler(name: str, scaler: Manifest, manifests: Manifests, ports: dict[str, set[int | str]]) -> Iterator[str]:
    target = scaler["spec"]["scaleTargetRef"]
    deployment = of_kind(manifests, "Deployment").get(target["name"])
    if target.get("kind", "Deployment") != "Deployment" or deployment is None:
        yield f"ScaledObject {name}: no Deployment {target['name']}; a RayService has no /scale"
        return
    if "replicas" in deployment["spec"]:
        yield f"ScaledObject {name}: each apply resets the number of replicas"
    for trigger in scaler["spec"]["triggers"]:
        if trigger["type"] == "prometheus":
            metadata = trigger["metadata"]
            if missing := {"serverAddress", "query", "threshold", "ignoreNullValues"} - set(metadata):
                yield f"ScaledObject {name}: the trigger lacks {', '.join(sorted(missing))}"
            if "metricName" in metadata:
                yield f"ScaledObject {name}: metricName is gone since KEDA 2.10"
            if "fallback" not in scaler["spec"]:
                yield f"ScaledObject {name}: no fallback for a Prometheus that does not answer"
            host, port = re.fullmatch(r"http://(.+):(\d+)", metadata.get("serverAddress", "http://?:0")).groups()  # type: ignore[union-attr]
            if int(port) not in ports.get(host.removesuffix(f".{COMPOSE['name']}"), set()):
                yield f"ScaledObject {name}: there is no Prometheus at {host}:{port}"


# -- variables


def variables(manifests: Manifests) -> Iterator[str]:
    """Each variable of ours is a field of its Settings, with a value that they take, compose.yaml's if it has one."""
    # Where Kubernetes differs: the keys, not loopback, guard the port; Secrets are variables or another path;
    # components/load is Locust's page, without the API that starts load tests.
    other = {"PROXY_ALLOW_ANONYMOUS", "PROXY_REDIS_URL", "PROXY_ADMIN_KEY_FILE", "PROXY_OPENAI_API_KEY_FILE",
             "PROXY_ROUTES_FILE", "PROXY_PRICES_FILE", "MODEL_CATALOGUE_FILE", "UI_PUBLIC_PROXY_URL",
             "MODEL_DEVICE", "UI_LOAD_URL", "LOAD_ALLOW_ANONYMOUS", "LOAD_ADMIN_KEY_FILE"}  # fmt: skip
    for pod in pods(manifests):
        service = pod.service.removesuffix("-worker")
        if service not in SETTINGS or pod.name.startswith(("ray-", "Job/")):
            continue
        prefix = f"{service.upper()}_"
        given = {key: value for key, value in environment(pod, manifests).items() if key.startswith(prefix)}
        fields = {f"{prefix}{field.upper()}" for field in SETTINGS[service].model_fields}
        yield from (f"{pod.name}: {name} is no setting" for name in sorted(set(given) - fields))
        known = {key: value for key, value in given.items() if key in fields and value is not None}
        try:
            SETTINGS[service](**{key.removeprefix(prefix).lower(): value for key, value in known.items()})
        except ValidationError as error:
            yield f"{pod.name}: {prefix}{error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
        for key, value in COMPOSE["services"][service]["environment"].items():
            fixed = unset(value or "")
            if fixed and key not in other and given.get(key) != fixed:
                yield f"{pod.name}: {key} is {given.get(key)}, and in compose.yaml {fixed}"
    for pod in pods(manifests):
        if pod.service == "proxy":
            given = environment(pod, manifests)
            if given.get("PROXY_REQUIRE_KEYS") != "true" or "PROXY_ADMIN_KEY" not in given:
                yield f"{pod.name}: answers callers without a key"
            mounted = [mount["mountPath"] for mount in pod.spec["containers"][0]["volumeMounts"]]
            for key in ("PROXY_CACHE_SECRET_FILE", "PROXY_LEDGER_FOLDER", "PROXY_FILES_DIR", "PROXY_ROUTES_FILE"):
                path = given.get(key)
                if path and not any(path == each or path.startswith(f"{each}/") for each in mounted):
                    yield f"{pod.name}: {key} is {path}, where nothing is mounted"
            shared = "files" in of_kind(manifests, "PersistentVolumeClaim")
            if (given.get("PROXY_FILES_ENABLED") == "true") is not shared:
                yield f"{pod.name}: PROXY_FILES_ENABLED without a folder that all replicas share"


def images(manifests: Manifests) -> Iterator[str]:
    """The lab's own images are those that compose.yaml builds; others are pinned to a version there, too."""
    composed = {unset(service["image"]) for service in COMPOSE["services"].values()}
    composed.add(re.search(r"FROM (\S+)", COMPOSE["services"]["redis"]["build"]["dockerfile_inline"]).group(1))  # type: ignore[union-attr]
    for pod in pods(manifests):
        for container in pod.containers:
            if container["image"] not in composed:
                yield f"{pod.name}: compose.yaml knows no image {container['image']}"


def redis(manifests: Manifests) -> Iterator[str]:
    """compose.yaml's arguments with a password; Ray's own redis never drops anything."""
    composed = unset(COMPOSE["services"]["redis"]["command"]).split()
    for pod in pods(manifests):
        if not pod.service.startswith("redis"):
            continue
        (container,) = pod.spec["containers"]
        arguments = [argument or '""' for argument in container["args"]]
        if "--requirepass" not in arguments:
            yield f"{pod.name}: no password"
            continue
        at = arguments.index("--requirepass")
        if (
            arguments[at + 1 :] != ["$(REDISCLI_AUTH)"]
            or environment(pod, manifests).get("REDISCLI_AUTH", "") is not None
        ):
            yield f"{pod.name}: the password does not come from a Secret"
        policy = "noeviction" if pod.service == "redis-gcs" else "volatile-lru"
        if arguments[:at] != [policy if argument == "volatile-lru" else argument for argument in composed]:
            yield f"{pod.name}: arguments differ from compose.yaml's, or the policy is not {policy}"
        if container["command"] != COMPOSE["services"]["redis"]["entrypoint"]:
            yield f"{pod.name}: command differs from compose.yaml's"


# -- KubeRay


def kuberay(manifests: Manifests) -> Iterator[str]:
    """The operator's rules, and what costs streams or pods although it accepts it."""
    for name, made in of_kind(manifests, "RayService").items():
        spec, cluster = made["spec"], made["spec"]["rayClusterConfig"]
        head, workers = cluster["headGroupSpec"], cluster.get("workerGroupSpecs", [])
        # 1. The RayService.
        if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > 47:
            yield f"RayService {name}: the name is no DNS-1035 label of at most 47 characters"
        upgrade = spec.get("upgradeStrategy", {})
        if upgrade.get("type", "NewCluster") not in {"NewCluster", "NewClusterWithIncrementalUpgrade", "None"}:
            yield f"RayService {name}: upgradeStrategy.type {upgrade['type']} does not exist"
        if upgrade.get("type") == "NewClusterWithIncrementalUpgrade":
            options = upgrade.get("clusterUpgradeOptions", {})
            if not cluster.get("enableInTreeAutoscaling") or not options.get("gatewayClassName"):
                yield f"RayService {name}: an incremental upgrade needs the in-tree autoscaler and a Gateway"
            if not 0 < options.get("stepSizePercent", 0) <= options.get("maxSurgePercent", 100):
                yield f"RayService {name}: stepSizePercent is not between 1 and maxSurgePercent"
            if options.get("intervalSeconds", 0) <= 0:
                yield f"RayService {name}: intervalSeconds must be positive"
        if spec.get("rayClusterDeletionDelaySeconds", 60) <= LONGEST_ANSWER:
            yield f"RayService {name}: the old cluster is deleted before the longest answer has ended"
        # 2. The cluster.
        if not str(cluster.get("rayVersion", "")).startswith(f"{CHECKED_RAY}."):
            yield f"RayService {name}: rayVersion is not {CHECKED_RAY}"
        if cluster.get("authOptions", {}).get("mode") != "token" or not cluster["authOptions"].get("secretName"):
            yield f"RayService {name}: authOptions: a token from a Secret, or each upgrade gets another"
        elif "auth_token" not in documented_secrets().get(cluster["authOptions"]["secretName"], set()):
            yield f"RayService {name}: the Secret of authOptions has no auth_token in docs/kubernetes.md"
        for gate in {"networkPolicy", "tlsOptions", "historyServerOptions"} & set(cluster):
            yield f"RayService {name}: {gate} is behind a gate that is off in KubeRay 1.7"
        options = cluster.get("autoscalerOptions", {})
        if options.get("version") != "v2":
            yield f"RayService {name}: autoscalerOptions.version is not v2"
        if options.get("securityContext", {}).get("capabilities") != {"drop": ["ALL"]}:
            yield f"RayService {name}: `restricted` refuses the head with this autoscaler's securityContext"
        if not {"cpu", "memory"} <= set(options.get("resources", {}).get("limits", {})):
            yield f"RayService {name}: the autoscaler has no limits"
        external = cluster.get("gcsFaultToleranceOptions")
        if external:
            host = external["redisAddress"].partition(":")[0]
            if host == "redis" or host not in of_kind(manifests, "Service"):
                yield f"RayService {name}: Ray's state needs a redis of its own, not {host}"
            if "valueFrom" not in external.get("redisPassword", {}):
                yield f"RayService {name}: the password of {host} does not come from a Secret"
        # 3. Its groups.
        if head["rayStartParams"].get("num-cpus") != "0":
            yield f"RayService {name}: replicas may land on the head"
        names = [group["groupName"] for group in workers]
        if len(set(names)) < len(names) or not workers:
            yield f"RayService {name}: worker groups need names of their own"
        for group in workers:
            if not group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
                yield f"RayService {name}: replicas of {group['groupName']} outside minReplicas and maxReplicas"
        for place, group in [("head", head), *((group["groupName"], group) for group in workers)]:
            yield from _group(f"RayService {name}, {place}", group, is_head=place == "head", manifests=manifests)


def _group(where: str, group: dict[str, Any], *, is_head: bool, manifests: Manifests) -> Iterator[str]:
    template, start = group["template"], group.get("rayStartParams", {})
    container, spec = template["spec"]["containers"][0], template["spec"]
    if {"app.kubernetes.io/name", NODE_TYPE, "ray.io/cluster"} & set(template["metadata"]["labels"]):
        yield f"{where}: overrides a label that KubeRay's Services select by"
    if "resources" in group and {"num-cpus", "num-gpus", "memory", "resources"} & set(start):
        yield f"{where}: resources both at the group and in rayStartParams"
    if not all(isinstance(value, str) for value in start.values()):
        yield f"{where}: rayStartParams are strings"
    if spec.get("restartPolicy", "Never") != "Never":
        yield f"{where}: autoscaler v2 wants restartPolicy Never"
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    home = _ray_environment(manifests).get("HOME")
    if home not in mounts:
        yield f"{where}: HOME is {home}, which cannot be written"
    shared = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {})  # noqa: S108 the container's
    store = int(start.get("object-store-memory", 0))
    limit = quantity(container["resources"]["limits"]["memory"])
    if shared.get("medium") != "Memory" or not 0 < store <= quantity(shared.get("sizeLimit", "0")) < limit / 2:
        yield f"{where}: object-store-memory, /dev/shm and the memory limit do not fit"
    probes = [container.get(f"{kind}Probe", {}) for kind in ("startup", "readiness", "liveness")]
    if any("exec" in probe or not probe for probe in probes):
        yield f"{where}: without probes of our own KubeRay adds ones that need wget and fail at once"
    if is_head and spec.get("serviceAccountName") not in of_kind(manifests, "ServiceAccount"):
        yield f"{where}: KubeRay does not make a ServiceAccount that is named"
    if is_head:
        offered = {port["name"]: port["containerPort"] for port in container["ports"]}
        if offered != {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "serve": 8000}:
            yield f"{where}: KubeRay's head Service takes its ports from the container: {offered}"
        return
    if spec.get("terminationGracePeriodSeconds", 30) <= LONGEST_ANSWER:
        yield f"{where}: is killed before the longest answer has ended"
    stop = str(container.get("lifecycle", {}).get("preStop", ""))
    if not stop or "ray stop" in stop or "ray', 'stop" in stop:
        yield f"{where}: preStop must drain before Ray stops, or streams are cut"


def _ray_environment(manifests: Manifests) -> dict[str, str]:
    return next((made["data"] for name, made in of_kind(manifests, "ConfigMap").items() if name.startswith("ray-")), {})


def unset(value: str) -> str:
    """A value of compose.yaml while none of the variables in it is set: the default of each ${NAME:-default}."""
    while (inner := re.sub(r"\$\{\w+:-([^{}]*)\}", r"\1", value)) != value:
        value = inner
    return value


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number: CPUs, bytes."""
    number, unit = re.fullmatch(r"([\d.]+)([a-zA-Z]*)", str(text)).groups()  # type: ignore[union-attr]
    factors = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
    return float(number) * factors[unit]


# -- Serve


def unknown_keys(given: Any, model: type[BaseModel], place: str = "") -> Iterator[str]:
    """Keys that a pydantic model would ignore, at any depth."""
    if not isinstance(given, dict):
        return
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    for key, value in given.items():
        if key not in fields:
            yield f"{place}{key}"
            continue
        for inner in _models(fields[key].annotation):
            for each in value if isinstance(value, list) else [value]:
                yield from unknown_keys(each, inner, f"{place}{key}.")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for each in getattr(annotation, "__args__", ()):
        yield from _models(each)


def serve_config(manifests: Manifests) -> Iterator[str]:
    """serveConfigV2: Serve's schema with unknown keys refused, and arguments that our applications take."""
    for made in of_kind(manifests, "RayService").values():
        config = yaml.safe_load(made["spec"]["serveConfigV2"])
        yield from (f"serveConfigV2: unknown key {key}" for key in unknown_keys(config, ServeDeploySchema))
        try:
            ServeDeploySchema.model_validate(config)
        except ValidationError as error:
            yield f"serveConfigV2: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
            continue
        yield from _applications(made, config)


def _applications(made: Manifest, config: dict[str, Any]) -> Iterator[str]:
    catalogue: dict[str, Any] = {}
    cluster = made["spec"]["rayClusterConfig"]
    limits = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]
    workers = cluster["workerGroupSpecs"][0]["maxReplicas"]
    has = {"cpus": quantity(limits["cpu"]), "gpus": quantity(limits.get("nvidia.com/gpu", "0"))}
    needs = dict.fromkeys(has, 0.0)
    for application in config["applications"]:
        name, arguments = application["name"], application["args"]
        kind: type[BaseModel] = ClusterArgs if application["route_prefix"] == "/" else AppArgs
        try:
            args = kind.model_validate(arguments)
        except ValidationError as error:
            yield f"serveConfigV2: args of {name}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
            continue
        yield from (f"serveConfigV2: {name} takes no argument {key}" for key in unknown_keys(arguments, kind))
        if args.cpus <= 0:  # type: ignore[attr-defined]
            yield f"serveConfigV2: {name} asks for no CPU: it creates no demand and may land on the head"
        if isinstance(args, ClusterArgs):
            catalogue = {entry.id: entry for entry in args.entries}
            if application["import_path"] != "lab_model.serving.cluster_app:build_cluster_app":
                yield f"serveConfigV2: {name} is not the catalogue"
            continue
        assert isinstance(args, AppArgs)
        if catalogue.get(args.entry.id) != args.entry:
            yield f"serveConfigV2: {name} differs from its entry in the catalogue"
        if (name, application["route_prefix"]) != (args.entry.id, f"/m/{args.entry.id}"):
            yield f"serveConfigV2: the proxy looks for {args.entry.id} at /m/{args.entry.id}"
        if application["import_path"] != "lab_model.serving.replica:build_app":
            yield f"serveConfigV2: {name} is not built by replica:build_app"
        if args.device == "cuda" and args.gpus <= 0:
            yield f"serveConfigV2: {name} runs on a GPU that it does not ask for"
        for resource, node in has.items():
            each = getattr(args, resource)
            if each > node:
                yield f"serveConfigV2: a replica of {name} wants {each} {resource}, a worker has {node}"
            needs[resource] += each * args.entry.most_replicas
    for resource, wanted in needs.items():
        if math.ceil(wanted) > has[resource] * workers:
            yield f"serveConfigV2: all replicas want {wanted} {resource}, all workers have {has[resource] * workers}"
    if config["http_options"]["port"] != PORTS["model"]:
        yield "serveConfigV2: Serve does not listen on the port of PROXY_MODEL_URL"


ALL = (hardening, probes, references, services, variables, images, redis, kuberay, serve_config)


def complaints(manifests: Manifests) -> list[str]:
    return [line for rule in ALL for line in rule(manifests)]
