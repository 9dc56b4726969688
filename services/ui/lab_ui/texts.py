"""The texts of the pages, from texts/LANGUAGE/PAGE.yaml; all languages have the same keys and placeholders.

Knows no page. A text is a string.Template: `$seconds` is a placeholder, `$$` a dollar sign. Callers format numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from importlib import resources
from string import Template
from typing import Any

import yaml

LANGUAGES = {"en": "English", "ko": "한국어"}


class Texts:
    """The texts of one language: `texts("chat.waiting", seconds="3.0")`. Raises KeyError for an unknown key or a
    missing value."""

    def __init__(self, language: str, texts: Mapping[str, str]) -> None:
        self.language = language
        self._templates = {key: Template(text) for key, text in texts.items()}

    def __call__(self, key: str, /, **values: str | int) -> str:
        return self._templates[key].substitute(values)

    def __contains__(self, key: str) -> bool:
        return key in self._templates

    @property
    def placeholders(self) -> dict[str, set[str]]:
        """Key -> names of the text's placeholders."""
        return {key: set(template.get_identifiers()) for key, template in self._templates.items()}


@functools.cache
def load(language: str) -> Texts:
    """The texts of `en` or `ko`. A key is the file's name and the nested keys, joined by dots."""
    texts: dict[str, str] = {}
    for file in resources.files("lab_ui").joinpath("texts", language).iterdir():
        page = file.name.removesuffix(".yaml")
        texts.update(_flat(yaml.safe_load(file.read_text(encoding="utf-8")), f"{page}."))
    return Texts(language, texts)


def choose(asked: str | None, setting: str, browser: str | None) -> str:
    """The language that the reader asked for, else the setting's, else Korean if the browser's is, else English."""
    for language in (asked, setting):
        if language and language in LANGUAGES:
            return language
    return "ko" if (browser or "").lower().split("-")[0].split("_")[0] == "ko" else "en"


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value).strip()
