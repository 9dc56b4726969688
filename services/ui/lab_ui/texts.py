"""The words of the pages: one YAML file a language, the same keys and placeholders in each."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

import yaml

LANGUAGES = {"en": "English", "ko": "한국어"}


class Texts:
    """The texts of one language. `texts("chat.waiting", seconds=3)`; an unknown key is a KeyError."""

    def __init__(self, language: str, words: dict[str, str]) -> None:
        self.language = language
        self._words = words

    def __call__(self, key: str, **values: Any) -> str:
        return self._words[key].format(**values)

    def __contains__(self, key: str) -> bool:
        return key in self._words


@functools.cache
def load(language: str) -> Texts:
    """Texts of `en` or `ko`, their nested keys joined by dots."""
    tree = yaml.safe_load(resources.files("lab_ui").joinpath("texts", f"{language}.yaml").read_text(encoding="utf-8"))
    return Texts(language, dict(_flat(tree)))


def first_language(wanted: str, browser: str | None) -> str:
    """`wanted` where the settings name one, else the browser's if it is Korean, else English."""
    if wanted in LANGUAGES:
        return wanted
    return "ko" if (browser or "").lower().split("-")[0].split("_")[0] == "ko" else "en"


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs = []
    for key, value in tree.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, str(value).strip())]
    return pairs
