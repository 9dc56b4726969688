"""GET /openapi.json: the OpenAPI 3.1 document of the endpoints, made from the schemas that validate their requests.

Knows paths and schemas. Imports no torch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

from .wire.endpoints import REQUESTS
from .wire.requests import NOT_SUPPORTED, WITHOUT_EFFECT

Object = dict[str, Any]
TEMPLATE = "#/components/schemas/{model}"
TEXT_OR_NULL: Object = {"type": ["string", "null"]}
ERROR: Object = {
    "description": "OpenAI's envelope, which every error has.",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": TEXT_OR_NULL | {"description": "The field with the error."},
                "code": TEXT_OR_NULL,
            },
        }
    },
}


@cache
def document(version: str) -> Object:
    """The OpenAPI document. version: of the service."""
    kinds, found = models_json_schema(
        [(shape, "validation") for shape in dict.fromkeys(REQUESTS.values())], ref_template=TEMPLATE
    )
    schemas: Object = found["$defs"]
    for shape in dict.fromkeys(REQUESTS.values()):
        fields = schemas[_name(kinds[shape, "validation"])]["properties"]
        for name in WITHOUT_EFFECT:
            fields.setdefault(name, {"description": "Any value: it cannot change an answer."})
        for name, same in NOT_SUPPORTED.items():
            fields.setdefault(
                name, {"enum": [*same, None], "description": "Not supported: values that change nothing."}
            )
    paths = {}
    for path, shape in REQUESTS.items():
        body = {"application/json": {"schema": kinds[shape, "validation"]}}
        paths[path] = {
            "post": {
                "operationId": path.removeprefix("/v1/").replace("/", "-"),
                "requestBody": {"required": True, "content": body},
                "responses": {
                    "200": {"description": "The answer."},
                    "default": {"$ref": "#/components/responses/Error"},
                },
            }
        }
    error = {
        "description": "An error.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "LLM Lab: model", "version": version},
        "paths": paths,
        "components": {"schemas": schemas | {"Error": ERROR}, "responses": {"Error": error}},
    }


def _name(reference: Object) -> str:
    return str(reference["$ref"]).rpartition("/")[2]
