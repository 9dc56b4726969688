"""The README is true: settings, defaults, errors, exit codes, commands, tree, and its examples run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lab_load.settings
import lab_model.settings
import lab_proxy.endpoints
import lab_proxy.settings
import lab_ui.settings
import pytest
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

from lab.terminal import MEANING

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SERVICES: dict[str, type[BaseSettings]] = {
    "ui": lab_ui.settings.Settings,
    "proxy": lab_proxy.settings.Settings,
    "model": lab_model.settings.Settings,
    "load": lab_load.settings.Settings,
}
TREE = {
    "lab": "the lab as local processes: `make lab`, `make doctor`, supervision",
    "services": "one folder a service, in the order a request meets them",
    "load": "Locust: throughput and caching",
    "bench": "measurements beside their targets: `make bench-proxy`",
    "k8s": "the same lab on Kubernetes",
    "tests": "one suite for all; `make test`",
}


def settings_table() -> str:
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for service, settings in SERVICES.items():
        for name, field in settings.model_fields.items():
            default = field.default
            assert default is not PydanticUndefined, f"{service}.{name} has no default"
            shown = (
                "" if default in (None, ()) else f"`{str(default).lower() if isinstance(default, bool) else default}`"
            )
            assert field.description, f"{service}.{name} has no description"
            meaning = field.description.replace("|", "\\|")
            rows.append(f"| `{service.upper()}_{name.upper()}` | {shown} | {meaning} |")
    return "\n".join(rows)


def defaults_table() -> str:
    tables: dict[str, Any] = lab_proxy.endpoints.default_tables()
    rows = ["| upstream | endpoint | field: default |", "|---|---|---|"]
    for upstream, endpoints in tables.items():
        for endpoint, fields in endpoints.items():
            said = ", ".join(f"`{name}: {json.dumps(value)}`" for name, value in fields.items())
            rows.append(f"| {upstream} | `{endpoint}` | {said} |")
    return "\n".join(rows)


def exits_table() -> str:
    return "\n".join(
        ["| exit code | meaning |", "|---|---|", *(f"| {code:d} | {said} |" for code, said in MEANING.items())]
    )


def tree() -> str:
    """Every module and every room with the first line of its docstring."""
    lines = ["```"]
    for folder, said in TREE.items():
        if not (ROOT / folder).is_dir():
            continue
        lines.append(f"{folder}/".ljust(34) + said)
        packages = [ROOT / folder] if folder == "lab" else sorted((ROOT / folder).glob("lab_*/"))
        if folder == "services":
            packages = [ROOT / f"services/{name}/lab_{name}" for name in SERVICES if name != "load"]
        for package in packages:
            if folder == "services":
                lines.append(f"  {package.relative_to(ROOT / folder)}/")
            for module in sorted([*package.glob("*.py"), *package.glob("*/__init__.py")]):
                name = module.name if module.parent == package else f"{module.parent.name}/"
                if name == "__init__.py":
                    continue
                first = re.search(r'"""(.+?)(?:\.(?:\s|$)|[;:] |"""|\n)', module.read_text(encoding="utf-8"))
                assert first, f"{module} says nothing of itself"
                lines.append(f"    {name}".ljust(34) + first.group(1).strip())
    return "\n".join([*lines, "```"])


PARTS = {"settings": settings_table, "defaults": defaults_table, "exits": exits_table, "tree": tree}


def part(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", README, re.S)
    assert found, f"README.md has no part {name}"
    return found.group(1)


def write() -> None:
    """`python tests/docs/test_docs.py`: bring the README's generated parts up to date."""
    text = README
    for name, make in PARTS.items():
        whole = f"<!-- {name} -->\n{make()}\n<!-- /{name} -->\n"
        pattern = rf"<!-- {name} -->\n(?:.*?\n<!-- /{name} -->\n)?"
        text = re.sub(pattern, lambda _, whole=whole: whole, text, count=1, flags=re.S)
    (ROOT / "README.md").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", PARTS)
def test_generated_parts_are_up_to_date(name: str) -> None:
    """Settings, cache defaults, exit codes and tree say what the code says (tests/docs/test_docs.py writes them)."""
    assert part(name) == PARTS[name]()


def test_every_command_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`(?:[A-Z_]+=\S+ )*make ([a-z0-9-]+)", README)) | set(
        re.findall(r"^make ([a-z0-9-]+)", README, re.M)
    )
    assert {"lab", "start", "stop", "test", "doctor"} <= named <= targets


def test_every_link_leads_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_ports_are_the_services_defaults() -> None:
    for service, settings in SERVICES.items():
        port = settings.model_fields["port"].default
        assert re.search(rf"^\| {service} \|.*127\.0\.0\.1:{port} ", README, re.M), service


def test_error_codes_are_those_of_the_code() -> None:
    """Every code in the README's table is raised somewhere; every code that is raised stands in the table."""
    table = README[README.index("| status | code |") : README.index("`make` commands end")]
    told = {
        code
        for row in table.splitlines()
        if row.startswith("|")
        for code in re.findall(r"`([a-z_]+)`", row.split("|")[2])
    }
    raised: set[str] = set()
    for module in ROOT.glob("services/*/lab_*/**/*.py"):
        raised |= set(re.findall(r'\bcode(?:: str \| None)? ?= ?"([a-z_]+)"', module.read_text(encoding="utf-8")))
    assert told == raised


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


def run(argv: list[str], text: str) -> str:
    done = subprocess.run(
        argv, input=text, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "NO_PROXY": "*"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("service", ["proxy", "model"])
def test_the_scripts_run_against_proxy_and_model(service: str, request: pytest.FixtureRequest) -> None:
    """Each in a namespace of its own, as in a file; one after the other in one process: `import openai` takes long."""
    url = request.getfixturevalue(f"{service}_url")
    scripts = [script.replace("http://127.0.0.1:8080", url) for script in blocks("python")]
    said = run([sys.executable, "-"], f"for script in {scripts!r}:\n    exec(script, {{}})\n    print('---')\n")
    first, second, _ = said.split("---\n")
    assert "Paris" in first
    assert "3 vectors of 384" in second


def test_the_curl_line_answers_and_then_hits(proxy_url: str) -> None:
    (line,) = [block for block in blocks("bash") if block.startswith("curl")]
    line = line.replace("http://127.0.0.1:8080", proxy_url)
    run(["bash"], line)
    again = run(["bash"], line)
    assert "Paris" in again
    assert re.search(r"^cache-status: llm-lab; hit", again, re.M | re.I)


if __name__ == "__main__":
    write()
