"""GET /openapi.json: the OpenAPI 3.1 document of this proxy, made from the table of endpoints and the pages.

The fields of an endpoint are those that the model service checks, from its own document. Knows the paths.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from ... import __version__
from ...endpoints import ENDPOINTS
from ...upstreams.model_list import ModelList
from ..response import PageRequest, Pages, Response
from .files import PATH as FILES

Object = dict[str, Any]
PATH = "/openapi.json"
ABOUT = (
    "The fields are those of the local models, which refuse any other field by its name. A request to another "
    "upstream may have fields of that upstream, see docs/api.md."
)
ANY_OBJECT: Object = {"content": {"application/json": {"schema": {"type": "object"}}}}
UPLOAD: Object = {"content": {"multipart/form-data": {"schema": {"type": "object"}}}}
ID: Object = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
RESPONSES: Object = {
    "200": {"description": "The answer."},
    "default": {"$ref": "#/components/responses/Error"},
}
TEXT_OR_NULL = {"type": ["string", "null"]}
ERROR: Object = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}}
            | {"param": TEXT_OR_NULL, "code": TEXT_OR_NULL},
        }
    },
}


class OpenApiPages:
    def __init__(self, models: ModelList, places: Iterable[tuple[str, str]]) -> None:
        """`places`: method and path of all pages, see Pages."""
        self._models, self._places = models, places

    def pages(self) -> Pages:
        return {("GET", PATH): self._get}

    async def _get(self, _: PageRequest, response: Response) -> None:
        await response.send(orjson.dumps(document(await self._models.openapi(), self._places)), {})


def document(model: Mapping[str, Any], places: Iterable[tuple[str, str]]) -> Object:
    """`model`: the model service's document; if it is empty, every endpoint accepts any object. `places`: as above."""
    paths: dict[str, Object] = {}
    for path in ENDPOINTS:
        known = model.get("paths", {}).get(path, {}).get("post", {})
        paths[path] = {"post": {"requestBody": ANY_OBJECT, **known, "responses": RESPONSES}}
    for method, path in places:
        page: Object = {"responses": RESPONSES}
        if method in ("POST", "PATCH"):
            page["requestBody"] = UPLOAD if path == FILES else ANY_OBJECT
        if "{id}" in path:
            page["parameters"] = [ID]
        paths.setdefault(path, {})[method.lower()] = page
    schemas = {**model.get("components", {}).get("schemas", {}), "Error": ERROR}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "LLM Lab", "version": __version__, "description": ABOUT},
        "security": [{}, {"key": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {"Error": {"description": "An error.", "content": error}},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
