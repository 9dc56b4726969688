"""The YAML files that an operator may replace: routes and prices.

Knows files and how their faults are told; does not know what is in them.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

Shape = TypeVar("Shape", bound=BaseModel)


def read(shape: type[Shape], path: Path | None, packaged: str, variable: str) -> Shape:
    """The file at `path`, else the one in the package. Raises ValueError in one line that names the variable."""
    try:
        text = (path or resources.files("lab_proxy").joinpath(packaged)).read_text("utf-8")
        return shape.model_validate(yaml.safe_load(text))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{variable} cannot be read: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        why = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{variable} is wrong at {where or 'the top'}: {why}") from None
