"""The list of models at /v1/models, as each caller may use it; the operator's pages that load, unload and add models.

Knows the model list and aliases."""

from typing import Any

import orjson

from ...endpoints import OPERATE_MODELS
from ...errors import InvalidRequest, ModelNotAllowed, ModelNotFound
from ...keys.identity import Identity
from ...upstreams.model_list import ModelList
from ...upstreams.routes import Routes
from ..guards import read_json
from ..response import PRIVATE, PageRequest, Pages, Response

PREFIX = "/v1/models/"
ACTIONS = ("load", "unload", "add")


class ModelPages:
    def __init__(self, routes: Routes, models: ModelList) -> None:
        self._routes, self._models = routes, models

    def pages(self) -> Pages:
        return {
            ("GET", "/v1/models"): self._list,
            ("GET", PREFIX + "{id}"): self._get,
            **{("POST", f"{OPERATE_MODELS}{action}"): self._operate for action in ACTIONS},
        }

    async def _operate(self, request: PageRequest, response: Response) -> None:
        """POST {"model": NAME}; the answer is the model service's."""
        body = await read_json(request)
        unknown = next((name for name in body if name != "model"), None)
        if unknown is not None:
            raise InvalidRequest(f"Unknown field `{unknown[:60]}`. The only field is `model`.", param=unknown[:60])
        model = body.get("model")
        if not isinstance(model, str) or not model:
            raise InvalidRequest("`model` must be the name of a model: see /v1/models.", param="model")
        status, answer = await self._models.operate(request.path.removeprefix(OPERATE_MODELS), model)
        await response.send(orjson.dumps(answer), PRIVATE, status=status)

    async def _list(self, request: PageRequest, response: Response) -> None:
        listed = list(self._allowed(request.identity).values())
        await response.send(orjson.dumps({"object": "list", "data": listed}), {})

    async def _get(self, request: PageRequest, response: Response) -> None:
        name = request.path.removeprefix(PREFIX)
        if not name:
            await self._list(request, response)
            return
        entry = self._allowed(request.identity).get(name)
        if entry is None and not request.identity.allows(name):
            raise ModelNotAllowed(f"This key may not use the model `{name[:200]}`.", param="model")
        if entry is None:
            self._routes.resolve(name, self._models.entries)  # raises ModelNotFound, unless a route has the name
            raise ModelNotFound(f"`{name[:200]}` goes to an upstream whose models are not listed here.", name)
        await response.send(orjson.dumps(entry), {})

    def _allowed(self, who: Identity) -> dict[str, dict[str, Any]]:
        models = self._models.entries
        aliases = self._routes.aliases(models)
        every = {
            **models,
            **{name: {**models[model], "id": name, "alias_of": model} for name, model in aliases.items()},
        }
        if who.models is None:
            return every
        return {name: each for name, each in every.items() if who.allows(name, each.get("alias_of", name))}
