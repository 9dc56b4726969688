"""The documents are true: generated parts, links, commands, error codes; and their examples run.

`.venv/bin/python tests/docs/test_docs.py` writes the generated parts.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lab_load.settings
import lab_model.settings
import lab_proxy.endpoints
import lab_proxy.settings
import lab_ui.settings
import pytest
import yaml
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

from lab.checks import TOOLS
from lab.terminal import MEANING

ROOT = Path(__file__).parents[2]
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.md")])
}
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
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
    "k8s": "the same lab on Kubernetes: base, models, components, overlays",
    "obs": "Prometheus and Grafana: alerts, dashboards",
    "tests": "one suite for all; `make test`",
}


# ---- generated parts


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
            values = ", ".join(f"`{name}: {json.dumps(value)}`" for name, value in fields.items())
            rows.append(f"| {upstream} | `{endpoint}` | {values} |")
    return "\n".join(rows)


def exits_table() -> str:
    return "\n".join(
        ["| exit code | meaning |", "|---|---|", *(f"| {code:d} | {meaning} |" for code, meaning in MEANING.items())]
    )


def errors_table() -> str:
    """Code, status and service of each error, from the code; the rest from docs/errors.yaml."""
    explained = yaml.safe_load((ROOT / "docs/errors.yaml").read_text(encoding="utf-8"))
    found = error_codes()
    assert set(found) == set(explained), f"docs/errors.yaml differs from the code: {set(found) ^ set(explained)}"
    rows = ["| code | status | from | when | what to do |", "|---|---|---|---|---|"]
    for code, places in sorted(found.items(), key=lambda item: (min(status for _, status in item[1]), item[0])):
        statuses = ", ".join(str(status) for status in sorted({status for _, status in places}))
        services = ", ".join(sorted({service for service, _ in places}, reverse=True))
        rows.append(f"| `{code}` | {statuses} | {services} | {explained[code]['when']} | {explained[code]['do']} |")
    return "\n".join(rows)


def error_codes() -> dict[str, set[tuple[str, int]]]:
    """Every code that proxy and model can send -> (service, HTTP status). Read from the source, nothing is imported."""
    found: dict[str, set[tuple[str, int]]] = {}
    for service in ("proxy", "model"):
        folder = ROOT / f"services/{service}/lab_{service}"
        statuses: dict[str, int] = {}  # class -> its status
        for node in ast.parse((folder / "errors.py").read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef):
                continue
            own = dict(_assigned(node))
            inherited = next((statuses[base.id] for base in node.bases if getattr(base, "id", "") in statuses), 0)
            statuses[node.name] = int(own.get("status", inherited))
            if isinstance(own.get("code"), str):
                found.setdefault(own["code"], set()).add((service, statuses[node.name]))
        for module in folder.glob("**/*.py"):
            for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                given = {word.arg: word.value for word in node.keywords}
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                status = getattr(given.get("status"), "value", statuses.get(name))
                if name not in statuses or not isinstance(status, int):
                    continue
                for code in {getattr(given.get("code"), "value", None)} - {None}:
                    found.setdefault(str(code), set()).add((service, status))
                if "code" not in given and "status" in given:
                    own_code = _class_code(folder, name)
                    if own_code:
                        found.setdefault(own_code, set()).add((service, status))
    return found


def _assigned(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    """Constants of a class: in its body, or in its keywords (`class NotFound(Error, status=404)`)."""
    for word in node.keywords:
        if word.arg and isinstance(word.value, ast.Constant):
            yield word.arg, word.value.value
    for line in node.body:
        targets = (
            line.targets if isinstance(line, ast.Assign) else [line.target] if isinstance(line, ast.AnnAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(getattr(line, "value", None), ast.Constant):
                yield target.id, line.value.value  # type: ignore[union-attr]


def _class_code(folder: Path, name: str) -> str | None:
    for node in ast.parse((folder / "errors.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return dict(_assigned(node)).get("code")
    return None


def tree() -> str:
    """Every module and every room with the first line of its docstring."""
    lines = ["```"]
    for folder, purpose in TREE.items():
        if not (ROOT / folder).is_dir():
            continue
        lines.append(f"{folder}/".ljust(34) + purpose)
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
                assert first, f"{module} has no docstring"
                lines.append(f"    {name}".ljust(34) + first.group(1).strip())
    return "\n".join([*lines, "```"])


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "settings": ("docs/settings.md", settings_table),
    "defaults": ("docs/cache.md", defaults_table),
    "errors": ("docs/errors.md", errors_table),
    "exits": ("docs/errors.md", exits_table),
    "tree": ("docs/architecture.md", tree),
}


def write() -> None:
    for name, (file, make) in PARTS.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        whole = f"<!-- {name} -->\n{make()}\n<!-- /{name} -->\n"
        pattern = rf"<!-- {name} -->\n(?:.*?\n)?<!-- /{name} -->\n"
        (ROOT / file).write_text(re.sub(pattern, lambda _, whole=whole: whole, text, count=1, flags=re.S), "utf-8")


@pytest.mark.parametrize("name", PARTS)
def test_generated_parts_are_up_to_date(name: str) -> None:
    """Settings, cache defaults, error codes, exit codes and tree agree with the code (this file writes them)."""
    file, make = PARTS[name]
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", DOCUMENTS[file], re.S)
    assert found, f"{file} has no part {name}"
    assert found.group(1) == make()


# ---- links, commands, settings


def anchors(text: str) -> set[str]:
    """Anchors of headings as GitHub makes them, and `<a id="…">`."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


def test_every_link_leads_somewhere() -> None:
    """Links and images of every document: the file exists, and so does the anchor."""
    for name, text in DOCUMENTS.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"https?://", link):
                continue
            file, _, anchor = link.partition("#")
            target = (ROOT / name).parent / file if file else ROOT / name
            assert target.exists(), f"{name}: {link}"
            if anchor:
                assert anchor in anchors(target.read_text(encoding="utf-8")), f"{name}: {link}"


def test_every_make_target_exists() -> None:
    """Every `make TARGET` of every document and of CI is a target of the Makefile."""
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    commands = "\n".join(re.findall(r"make [a-z0-9-]+", workflow)) + "\n"
    for name, text in [*DOCUMENTS.items(), ("ci.yml", commands)]:
        named = set(re.findall(r"(?:`|^|\| )(?:[A-Z_]+=\S+ )*make ([a-z0-9-]+)(?=[`\s])", text, re.M))
        assert named <= TARGETS, f"{name}: {named - TARGETS}"
    assert len(DOCUMENTS["README.md"].splitlines()) <= 200


def test_every_setting_exists() -> None:
    """A setting that a document names is one of a service, of the lab's commands, or of compose."""
    known = {f"{service.upper()}_{name.upper()}" for service, each in SERVICES.items() for name in each.model_fields}
    others = "\n".join(
        path.read_text(encoding="utf-8")
        for path in [*ROOT.glob("lab/*.*"), *ROOT.glob("compose*.yaml"), ROOT / "Makefile"]
    )
    for name, text in DOCUMENTS.items():
        if name == "CHANGELOG.md":  # it also names settings that are gone
            continue
        for variable in set(re.findall(r"\b((?:UI|PROXY|MODEL|LOAD|LAB)_[A-Z_]+[A-Z])\b", text)):
            assert variable in known or variable in others, f"{name}: {variable}"


def test_pre_commit_runs_the_tools_of_make_check() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert [hook["name"] for hook in hooks] == list(TOOLS)
    for hook in hooks:
        tool = re.sub(r"^-m ", "", " ".join(TOOLS[hook["name"]]).removesuffix(" ."))
        assert set(tool.replace("--check", "").split()) <= set(hook["entry"].replace(".venv/bin/", "").split()), hook


def test_ports_are_the_services_defaults() -> None:
    for service, settings in SERVICES.items():
        port = settings.model_fields["port"].default
        assert re.search(rf"^\| {service} \|.*127\.0\.0\.1:{port} ", DOCUMENTS["README.md"], re.M), service


def outline(text: str) -> dict[str, list[str]]:
    """What both languages of the README share: levels of headings, commands, links, and the code in table rows."""
    text = text.replace("tour.ko.md", "tour.md")  # each leads to the tour in its own language
    fences = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    rows = [re.findall(r"`([^`]+)`|\(([^)\s]+\.md)\)", row) for row in re.findall(r"^\|.*$", prose, re.M)]
    return {
        "headings": re.findall(r"^#+(?= )", prose, re.M),
        "code": [f"{language}\n{re.sub('  +#.*', '', code)}" for language, code in fences],
        "links": [
            link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "images/" not in link and "README" not in link
        ],
        "tables": [" ".join(sorted(map("".join, row))) for row in rows],
    }


def test_both_languages_of_the_readme_say_the_same() -> None:
    """README.ko.md has the headings, commands, examples, links and tables of README.md, in the same order."""
    english, korean = outline(DOCUMENTS["README.md"]), outline(DOCUMENTS["README.ko.md"])
    for part, expected in english.items():
        assert korean[part] == expected, part
    assert re.search("[가-힣]", DOCUMENTS["README.ko.md"])


# ---- examples


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENTS[name], re.S | re.M)


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
    found = [script for name in ("README.md", "docs/api.md", "docs/class.md") for script in blocks(name, "python")]
    scripts = [script.replace("http://127.0.0.1:8080", url) for script in found]
    output = run([sys.executable, "-"], f"for script in {scripts!r}:\n    exec(script, {{}})\n    print('---')\n")
    first, second, perplexity, third, fourth, fifth, _ = output.split("---\n")
    assert "Paris" in first
    assert second.strip()
    assert float(perplexity) > 1
    assert "3 vectors of 384" in third
    assert "POSITIVE" in fourth
    assert "neural networks" in fourth
    assert "smollm2-135m-instruct" in fifth


def test_the_curl_lines_answer_and_then_hit(proxy_url: str) -> None:
    (line,) = [block for block in blocks("README.md", "bash") if block.startswith("curl")]
    line = line.replace("http://127.0.0.1:8080", proxy_url)
    run(["bash"], line)
    again = run(["bash"], line)
    assert "Paris" in again
    assert re.search(r"^cache-status: llm-lab; hit", again, re.M | re.I)
    answers = []
    for block in blocks("docs/api.md", "bash"):
        answers.append(json.loads(run(["bash"], block.replace("http://127.0.0.1:8080", proxy_url))))
        assert "error" not in answers[-1], block
    (explained,) = [answer for answer in answers if "canonical" in answer]
    assert explained["differs"]


if __name__ == "__main__":
    write()
