"""GET /openapi.json names every path and every field, and nothing else: of the model service and through the proxy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jsonschema
import pytest
from fixtures_proxy import Bench, eventually
from lab_model.api.openapi import document
from lab_model.api.wire.endpoints import REQUESTS
from lab_model.api.wire.requests import NOT_SUPPORTED, WITHOUT_EFFECT
from lab_model.models.kinds import PATHS
from lab_proxy.endpoints import ENDPOINTS
from openapi_spec_validator import validate
from pydantic import ValidationError

SERVED = {
    ("get", "/v1/models"),
    ("get", "/v1/models/{id}"),
    ("post", "/v1/files"),
    ("get", "/v1/files/{id}/content"),
    ("post", "/v1/batches/{id}/cancel"),
    ("post", "/cache/explain"),
    ("get", "/usage"),
    ("patch", "/admin/keys/{id}"),
    ("get", "/openapi.json"),
}  # of the proxy's pages
MODEL = document("1")


def fields(found: Mapping[str, Any], path: str) -> set[str]:
    """The fields of a path's request by the document."""
    content = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = found["components"]["schemas"][content["$ref"].rpartition("/")[2]] if "$ref" in content else content
    return set(schema.get("properties", ()))


def test_the_models_document_is_valid() -> None:
    validate(MODEL)
    assert set(MODEL["paths"]) == set(PATHS)


@pytest.mark.parametrize("path", PATHS)
def test_the_document_has_the_fields_that_are_checked(path: str) -> None:
    """Those that the shape takes, those without effect and those that are refused unless they have their default."""
    named, elsewhere = fields(MODEL, path), {*WITHOUT_EFFECT, *NOT_SUPPORTED}
    assert named >= elsewhere
    with pytest.raises(ValidationError) as refused:
        REQUESTS[path].model_validate({**dict.fromkeys(named, object()), "unheard_of": 1})
    unknown = {fault["loc"][0] for fault in refused.value.errors() if fault["type"] == "extra_forbidden"}
    assert "unheard_of" in unknown
    assert named & unknown <= elsewhere
    assert set(REQUESTS[path].model_fields) <= named


def test_the_proxy_names_its_paths_and_the_models_fields(bench: Bench) -> None:
    """All endpoints with the model service's fields, all pages, the error; without the model's document too."""
    bare = bench.http.get("/openapi.json").json()
    validate(bare)
    bench.control(openapi=MODEL)
    eventually(lambda: fields(bench.http.get("/openapi.json").json(), "/v1/completions"), what="it is read again")
    found = bench.http.get("/openapi.json").json()
    validate(found)
    for each in (bare, found):
        assert set(ENDPOINTS) <= set(each["paths"])
        assert {(method, path) for path, methods in each["paths"].items() for method in methods} >= SERVED
    for path in PATHS:
        assert fields(found, path) == fields(MODEL, path)
    error = bench.http.post("/v1/chat/completions", json={"model": "unheard-of", "messages": []})
    assert error.status_code == 404
    jsonschema.validate(error.json(), found["components"]["schemas"]["Error"])
