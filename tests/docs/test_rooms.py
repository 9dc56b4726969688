"""The rooms of each service: imports run in one direction, no files import each other, each room says what it knows.

The imports are read from the source: those under TYPE_CHECKING and those inside functions count too.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

SERVICES = Path(__file__).parents[2] / "services"


@dataclass(frozen=True)
class House:
    """A service's package. A room may import the rooms after it in `rooms`, and the ground."""

    package: Path
    rooms: tuple[str, ...]
    composition: frozenset[str]  # files at the root that import anything; only each other imports them
    ground: tuple[str, ...]  # files at the root that import no room, only the ground after them
    scripts: tuple[str, ...] = ()  # modules that Streamlit runs by their path: they import by the package's name

    def files(self) -> dict[str, Path]:
        """Dotted module name below the package -> file. A sub-package is named like its folder."""
        found = {}
        for path in sorted(self.package.rglob("*.py")):
            if not (path.parent / "__init__.py").exists():
                continue  # stand-ins for packages that a process shall not find
            parts = path.relative_to(self.package).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        return found

    def imports(self) -> dict[str, set[str]]:
        """Module -> the modules of the package that it imports."""
        files = self.files()
        return {
            name: set(_imported(path, name, files, self.package.name, script=name in self.scripts))
            for name, path in files.items()
        }


HOUSES = {
    "proxy": House(
        SERVICES / "proxy/lab_proxy",
        rooms=("http", "batches", "requests", "keys", "upstreams", "cache", "ledger", "redis", "telemetry"),
        composition=frozenset({"__main__", "cli"}),
        ground=("reload", "tasks", "lru", "long_bodies", "canonical", "endpoints", "settings", "errors", ""),
    ),
    "model": House(
        SERVICES / "model/lab_model",
        rooms=("serving", "models", "api", "text", "encoders", "runners", "engine", "weights"),
        composition=frozenset({"__main__", "cli"}),
        ground=("host", "settings", "errors", ""),
    ),
    "ui": House(
        SERVICES / "ui/lab_ui",
        rooms=("app_pages", "drawing"),
        composition=frozenset({"__main__", "app"}),
        ground=(
            "start",
            "exports",
            "history",
            "chat",
            "tasks",
            "tools",
            "limits",
            "load",
            "cache",
            "layers",
            "next_token",
            "tokens",
            "charts",
            "faults",
            "status",
            "session",
            "proxy",
            "surprise",
            "wire",
            "answer",
            "snippets",
            "prices",
            "texts",
            "formats",
            "untrusted",
            "links",
            "pages",
            "settings",
            "traces",
            "",
        ),
        scripts=(
            "app",
            "app_pages.start",
            "app_pages.chat",
            "app_pages.tokens",
            "app_pages.next_token",
            "app_pages.tasks",
            "app_pages.tools",
            "app_pages.cache",
            "app_pages.limits",
            "app_pages.load",
            "app_pages.status",
        ),
    ),
    "load": House(
        SERVICES.parent / "load/lab_load",
        rooms=("commands", "generator", "reports", "measures", "workloads"),
        composition=frozenset({"__main__"}),
        ground=("settings", "shape", ""),
        scripts=("generator.users",),
    ),
}


def _imported(path: Path, name: str, files: dict[str, Path], package: str, *, script: bool = False) -> list[str]:
    found = []
    inside = name.split(".") if path.name == "__init__.py" and name else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(each.name.split(".")[0] == package for each in node.names), f"{path}: an absolute import"
        if not isinstance(node, ast.ImportFrom):
            continue
        first, _, module = (node.module or "").partition(".")
        if not node.level:
            if first != package:
                continue
            assert script, f"{path}:{node.lineno}: an absolute import"
        else:
            assert not script, f"{path}:{node.lineno}: a relative import"
            base = inside[: len(inside) - node.level + 1]
            module = ".".join([*base, *([node.module] if node.module else [])])
        for each in node.names:
            below = f"{module}.{each.name}" if module else each.name
            found.append(below if below in files else module)
    return found


def _room(house: House, module: str) -> str | None:
    """The room of a module; None for a file at the root."""
    first, _, rest = module.partition(".")
    return first if rest or first in house.rooms else None


def wrong_imports(house: House) -> list[str]:
    """Each import that runs against the order of the rooms."""
    wrong = []
    for name, imported in house.imports().items():
        room = _room(house, name)
        assert room is None or room in house.rooms, f"{name} is in no room of the list"
        for other in sorted(imported):
            target = _room(house, other)
            if target is None and other in house.composition and name not in house.composition:
                wrong.append(f"{name} imports {other}, which is composition")
            elif room is None and name in house.ground:
                if target is not None or house.ground.index(other) <= house.ground.index(name):
                    wrong.append(f"{name} is ground and imports {other}")
            elif room is not None and target is not None and house.rooms.index(target) < house.rooms.index(room):
                wrong.append(f"{name} imports {other}")
    return wrong


def cycle(house: House) -> list[str]:
    """Files that import each other in a circle, if there are any."""
    graph = house.imports()
    done: set[str] = set()

    def look(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if found := look(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in graph if (found := look(name, []))), [])


@pytest.mark.parametrize("service", HOUSES)
def test_rooms_import_in_one_direction(service: str) -> None:
    """A room imports only rooms after it in the list; the ground imports no room; nobody imports the composition."""
    assert not wrong_imports(HOUSES[service])


@pytest.mark.parametrize("service", HOUSES)
def test_no_files_import_each_other(service: str) -> None:
    assert not cycle(HOUSES[service])


@pytest.mark.parametrize("service", HOUSES)
def test_each_room_says_what_it_knows(service: str) -> None:
    """A sub-package's `__init__.py` holds one docstring and nothing else; every file at the root has its place."""
    house = HOUSES[service]
    for name, path in house.files().items():
        if path.name == "__init__.py" and name:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assert ast.get_docstring(tree), name
            assert len(tree.body) == 1, f"{name}: code in __init__.py"
        assert _room(house, name) or name in house.composition or name in house.ground, f"{name} has no place"
