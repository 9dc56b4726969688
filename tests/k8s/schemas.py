"""Manifests against Kubernetes' own schemas and against CRDs, as the API server checks them.

The order is the server's: nulls are pruned, defaults applied, then unknown fields refused. The CRDs of KubeRay are not
part of this repository: KUBERAY_CRDS names a folder with ray.io_*.yaml (ray-operator/config/crd/bases of its release),
and, for the test of the validator itself, `samples/` beside them (ray-operator/config/samples).
"""

from __future__ import annotations

import copy
import functools
import json
import os
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator

KUBERNETES = "1.37"
CRDS = Path(os.environ["KUBERAY_CRDS"]) if os.environ.get("KUBERAY_CRDS") else None

# KEDA 2.21, keda.sh/v1alpha1: the fields of its CRD without those that KEDA writes itself.
_TEXT, _COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
_OPEN = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
SCALED_OBJECT: dict[str, Any] = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "keda.sh/v1alpha1"},
        "kind": {"const": "ScaledObject"},
        "metadata": _OPEN,
        "spec": {
            "type": "object",
            "required": ["scaleTargetRef", "triggers"],
            "properties": {
                "scaleTargetRef": {
                    "type": "object",
                    "required": ["name"],
                    "properties": dict.fromkeys(("apiVersion", "kind", "name", "envSourceContainerName"), _TEXT),
                },
                "pollingInterval": _COUNT, "initialCooldownPeriod": _COUNT, "cooldownPeriod": _COUNT,
                "idleReplicaCount": _COUNT, "minReplicaCount": _COUNT, "maxReplicaCount": _COUNT,
                "fallback": {
                    "type": "object",
                    "required": ["failureThreshold", "replicas"],
                    "properties": {"failureThreshold": _COUNT, "replicas": _COUNT, "behavior": _TEXT},
                },
                "advanced": {
                    "type": "object",
                    "properties": {
                        "restoreToOriginalReplicaCount": {"type": "boolean"},
                        "horizontalPodAutoscalerConfig": {
                            "type": "object", "properties": {"name": _TEXT, "behavior": _OPEN},
                        },
                        "scalingModifiers": _OPEN,
                    },
                },
                "triggers": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["type", "metadata"],
                        "properties": {
                            "type": _TEXT, "name": _TEXT, "useCachedMetrics": {"type": "boolean"},
                            "metricType": {"enum": ["AverageValue", "Value", "Utilization"]},
                            "metadata": {"type": "object", "additionalProperties": _TEXT},
                            "authenticationRef": {"type": "object", "properties": {"name": _TEXT, "kind": _TEXT}},
                        },
                    },
                },
            },
        },
    },
}  # fmt: skip


def without_nulls(value: Any) -> Any:
    """The API server drops fields that are null."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """`value` with the schema's defaults filled in, as far as their parents are there."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for key, each in properties.items():
            if key not in value and "default" in each:
                value[key] = copy.deepcopy(each["default"])
        extra = schema.get("additionalProperties")
        for key, each in value.items():
            known = properties.get(key) or (extra if isinstance(extra, dict) else None)
            if known:
                value[key] = with_defaults(each, known)
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        value[:] = [with_defaults(each, schema["items"]) for each in value]
    return value


def strict(schema: Any) -> Any:
    """A structural schema as JSON Schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {}
    for key, value in schema.items():
        if key == "properties":  # its keys are names of fields, not keywords
            made[key] = {name: strict(each) for name, each in value.items()}
        elif key not in {"default", "enum", "format"}:
            made[key] = strict(value)
        elif key == "enum":
            made[key] = value
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    closed = "properties" in schema and "additionalProperties" not in schema
    if closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    return made


def _envelope(schema: dict[str, Any]) -> dict[str, Any]:
    """A CRD's schema leaves metadata to the server."""
    properties = schema["properties"] | {"metadata": _OPEN}
    return {**schema, "properties": properties}


@functools.cache
def _crd(kind: str) -> tuple[dict[str, Any], Draft202012Validator]:
    if kind == "ScaledObject":
        return SCALED_OBJECT, Draft202012Validator(strict(SCALED_OBJECT))
    assert CRDS is not None
    text = (CRDS / f"ray.io_{kind.lower()}s.yaml").read_text()
    loaded = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    (version,) = (each for each in loaded["spec"]["versions"] if each["name"] == "v1")
    schema = _envelope(version["schema"]["openAPIV3Schema"])
    return schema, Draft202012Validator(strict(schema))


def faults(made: dict[str, Any]) -> list[str]:
    """What the API server would refuse. A RayService is not checked without KUBERAY_CRDS."""
    return list(_faults(json.dumps(made, sort_keys=True)))


@functools.cache
def _faults(text: str) -> tuple[str, ...]:
    made = without_nulls(json.loads(text))
    kind, name = made["kind"], made["metadata"].get("name")
    if kind == "ScaledObject" or kind.startswith("Ray"):
        if kind.startswith("Ray") and CRDS is None:
            return ()
        schema, validator = _crd(kind)
        errors = validator.iter_errors(with_defaults(made, schema))
        return tuple(f"{kind} {name}: {'.'.join(map(str, each.absolute_path))}: {each.message}" for each in errors)
    try:
        kubernetes_validate.validate(made, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return (f"{kind} {name}: {'.'.join(map(str, error.path))}: {error.message}",)
    return ()
