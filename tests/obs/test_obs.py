"""Alerts and dashboards: tested by promtool, and run against a real Prometheus that scrapes a running lab."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import lab_proxy.telemetry.metrics as proxy_metrics
import openai
import prometheus_client
import pytest
import yaml
from fixtures_proxy import Bench, new
from processes import Process, eventually, free_port, process

ROOT = Path(__file__).parents[2]
OBS = ROOT / "obs"
SCHEMA = json.loads(Path(__file__).with_name("dashboard_schema.json").read_text())
RULES = yaml.safe_load((OBS / "alerts.yml").read_text())["groups"][0]["rules"]
RUNBOOK = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")
NAME = re.compile(r"\b((?:lab_proxy|lab_model|vllm:)[a-z0-9_:]*\w|up)\b(?!=)")
OF_PROMETHEUS = {"job", "instance", "le"}  # labels that every series or every bucket has
# Nothing of these happens in the test: their queries are checked by names and labels alone.
QUIET = {"lab_proxy_redis_errors_total", "lab_proxy_fallbacks_total", "lab_proxy_limits_refused_total",
         "lab_proxy_reconciled_total", "vllm:num_preemptions_total", "lab_model_engine_faults_total"}  # fmt: skip

needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool is not here: Debian's package `prometheus`"
)


def written() -> Any:
    """obs/dashboards.py as a module."""
    spec = importlib.util.spec_from_file_location("dashboards", OBS / "dashboards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BOARDS = {name: json.loads((OBS / f"dashboards/{name}.json").read_text()) for name in written().DASHBOARDS}
QUERIES = [
    pytest.param(target["expr"], target["legendFormat"], id=f"{name}-{panel['title']}-{target['refId']}")
    for name, board in BOARDS.items()
    for panel in board["panels"]
    for target in panel["targets"]
]


# -- alerts


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False, timeout=60)


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then() -> None:
    done = promtool("test", "rules", OBS / "alerts_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert promtool("check", "config", OBS / "prometheus.yml").returncode == 0


@needs_promtool
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_each_alert_is_tested(rule: dict[str, Any], tmp_path: Path) -> None:
    """Its test fails without it, and fails where it always fires."""
    shutil.copy(OBS / "alerts_test.yml", tmp_path)
    for expr in ("vector(0) > 1", "vector(1)"):
        changed = [each | {"expr": expr} if each is rule else each for each in RULES]
        (tmp_path / "alerts.yml").write_text(yaml.safe_dump({"groups": [{"name": "lab", "rules": changed}]}))
        assert promtool("test", "rules", tmp_path / "alerts_test.yml").returncode != 0, expr


def test_each_alert_has_a_row_in_the_runbook() -> None:
    rows = set(re.findall(r"^\| ([A-Z]\w+) \|", RUNBOOK, re.M))
    assert rows == {rule["alert"] for rule in RULES}


# -- dashboards


def test_dashboards_are_what_the_tables_say() -> None:
    """`python obs/dashboards.py` writes them."""
    module = written()
    assert sorted(path.stem for path in (OBS / "dashboards").glob("*.json")) == sorted(module.DASHBOARDS)
    for name in module.DASHBOARDS:
        assert (OBS / f"dashboards/{name}.json").read_text() == module.text(name)


def faults(boards: Sequence[dict[str, Any]]) -> list[str]:
    """What Grafana would refuse or draw wrong: against the schema, then what a schema cannot say."""
    (source,) = yaml.safe_load((OBS / "grafana/datasources.yaml").read_text())["datasources"]
    found = [
        f"{board.get('uid')}: {error.json_path}: {error.message}"
        for board in boards
        for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(board)
    ]
    if found:
        return found
    found += [f"the uid {uid} is there twice" for uid in _twice(board["uid"] for board in boards)]
    for board in boards:
        panels = board["panels"]
        found += [f"{board['uid']}: the id {each} is there twice" for each in _twice(panel["id"] for panel in panels)]
        places = [
            (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
            for panel in panels
            for x in range(panel["gridPos"]["w"])
            for y in range(panel["gridPos"]["h"])
        ]
        found += [f"{board['uid']}: panels overlap at {place}" for place in _twice(places)[:1]]
        found += [f"{board['uid']}: a panel ends at column {x + 1} of 24" for x, _ in sorted(places)[-1:] if x > 23]
        for panel in panels:
            where = f"{board['uid']}: {panel['title']}"
            found += [
                f"{where}: the refId {each} is there twice" for each in _twice(t["refId"] for t in panel["targets"])
            ]
            uids = {panel["datasource"]["uid"], *(target["datasource"]["uid"] for target in panel["targets"])}
            found += [f"{where}: no data source {uid} is provisioned" for uid in uids - {source["uid"]}]
    return found


def _twice(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def test_dashboards_are_complete() -> None:
    assert faults(list(BOARDS.values())) == []


def _panel(change: Callable[[dict[str, Any]], object]) -> Callable[[list[dict[str, Any]]], object]:
    """A change of the overview's second panel."""
    return lambda boards: change(boards[0]["panels"][1])


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (_panel(lambda p: p.update(type="timeserie")), "'timeserie' is not one of"),
        (_panel(lambda p: p["datasource"].pop("uid")), "'uid' is a required property"),
        (_panel(lambda p: p["targets"][0].pop("datasource")), "'datasource' is a required property"),
        (_panel(lambda p: p["datasource"].update(uid="prom")), "no data source prom"),
        (_panel(lambda p: p.pop("gridPos")), "'gridPos' is a required property"),
        (_panel(lambda p: p["gridPos"].update(w=25)), "25 is greater than the maximum"),
        (_panel(lambda p: p["gridPos"].update(w=17)), "ends at column 25"),
        (_panel(lambda p: p["gridPos"].update(x=4)), "overlap"),
        (_panel(lambda p: p.update(id=1)), "the id 1 is there twice"),
        (_panel(lambda p: p["targets"].append(dict(p["targets"][0]))), "the refId A is there twice"),
        (_panel(lambda p: p["targets"][0].update(expr="")), "should be non-empty"),
        (_panel(lambda p: p["targets"].clear()), "should be non-empty"),
        (_panel(lambda p: p["targets"][0].update(format="table")), "Additional properties"),
        (_panel(lambda p: p["fieldConfig"]["defaults"].update(unit="request")), "'request' is not one of"),
        (lambda boards: boards[0].pop("schemaVersion"), "'schemaVersion' is a required property"),
        (lambda boards: boards[0].update(id=7), "Additional properties"),
        (lambda boards: boards[0].update(uid=boards[1]["uid"]), "is there twice"),
    ],
    ids=["type", "no uid", "target", "unknown uid", "no place", "wide", "off the grid", "overlap", "id", "refId",
         "no query", "no queries", "field", "unit", "version", "board's field", "board's uid"],
)  # fmt: skip
def test_a_planted_mistake_in_a_dashboard_is_found(plant: Callable[[list[dict[str, Any]]], object], words: str) -> None:
    boards = copy.deepcopy([BOARDS[name] for name in ("overview", "model")])
    plant(boards)
    found = faults(boards)
    assert any(words in line for line in found), found


def known() -> dict[str, set[str]]:
    """Every metric of proxy and model, by the names of its samples -> its labels; from the code."""
    from lab_model.api import generator  # noqa: F401 its import registers the metrics

    found: dict[str, set[str]] = {"up": set()}
    for name, (_, labels) in proxy_metrics._COUNTERS.items():
        found[f"lab_proxy_{name}_total"] = set(labels)
    for name, (_, labels, _) in proxy_metrics._TIMES.items():
        found[f"lab_proxy_{name}_seconds_bucket"] = set(labels)
    for name, (_, labels) in proxy_metrics._GAUGES.items():
        found[f"lab_proxy_{name}"] = set(labels)
    for collector in set(prometheus_client.REGISTRY._names_to_collectors.values()):
        name, labels = getattr(collector, "_name", ""), set(getattr(collector, "_labelnames", ()))
        suffix = {"counter": "_total", "histogram": "_bucket"}.get(getattr(collector, "_type", ""), "")
        if name.startswith(("lab_model_", "vllm:")):
            found[name + suffix] = labels
    return found


@pytest.mark.parametrize(("query", "legend"), QUERIES)
def test_a_query_names_what_there_is(query: str, legend: str) -> None:
    """Metrics and labels, also those of an alert."""
    _check(query, legend)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_names_what_there_is(rule: dict[str, Any]) -> None:
    _check(rule["expr"], "")


def _check(query: str, legend: str) -> None:
    metrics = known()
    named = set(NAME.findall(query))
    assert named
    assert named <= set(metrics)
    labels = OF_PROMETHEUS.union(*(metrics[name] for name in named))
    grouped = {label.strip() for part in re.findall(r"by \(([^)]*)\)", query) for label in part.split(",")}
    chosen = set(re.findall(r'(\w+)(?:=|!=|=~|!~)"', query))
    assert (grouped | chosen | set(re.findall(r"\{\{(\w+)\}\}", legend))) <= labels


# -- a real Prometheus


@pytest.fixture(scope="module")
def prometheus(running: Bench, model_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Prometheus with the repository's configuration, at the addresses of a proxy and of the real model service."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not here: Debian's package `prometheus`")
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    config = yaml.safe_load((OBS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    proxy, model = config["scrape_configs"]
    del proxy["dns_sd_configs"]
    proxy["static_configs"] = [{"targets": [f"127.0.0.1:{running.proxy.port}"]}]
    model["static_configs"] = [{"targets": [model_url.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(OBS / "alerts.yml", folder)
    argv = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=exemplar-storage"]  # fmt: skip
    with process("prometheus", argv, port=port, log_dir=folder, ready="/-/ready") as started:
        yield started


def ask(prometheus: Process, query: str) -> list[dict[str, Any]]:
    """The series that an instant query finds."""
    with httpx2.Client(timeout=30) as client:
        answer = client.get(f"{prometheus.url}/api/v1/query", params={"query": query}).json()
    assert answer["status"] == "success", answer
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def use(bench: Bench, model_url: str) -> None:
    """Some of everything: streams, hits, vectors, refusals, a retry, a model with a price; and the model itself."""
    text = new()
    for _ in range(2):
        assert bench.chat(text, model="gpt-4o-mini").status_code == 200
        assert bench.chat(text, model="gpt-4o-mini", stream=True).status_code == 200
        bench.embed(text)
    assert bench.chat(stream=True).status_code == 200  # a miss
    bench.control(bench.paid, script=[503, "ok"])
    assert bench.chat().status_code == 200
    assert bench.chat(model="no-such-model").status_code == 404
    bench.chat(model="gpt-mock-500")
    with openai.OpenAI(base_url=f"{model_url}/v1", api_key="any", max_retries=0, timeout=120) as client:
        messages: list[Any] = [{"role": "user", "content": "a long enough prompt for a page of the prefix cache " * 8}]
        for _ in range(2):
            for _ in client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, stream=True):
                pass


def test_every_query_finds_series(prometheus: Process, running: Bench, model_url: str) -> None:
    """The dashboards load without a missing metric, each line of a panel has the labels of its legend."""
    eventually(lambda: len(ask(prometheus, "up == 1")) == 2, what="both targets are scraped")
    use(running, model_url)
    eventually(lambda: ask(prometheus, "lab_proxy_cost_usd_total > 0"), what="the traffic was scraped")
    use(running, model_url)
    before = ask(prometheus, "sum(lab_proxy_requests_total)")[0]["value"][1]
    use(running, model_url)
    eventually(
        lambda: float(ask(prometheus, "sum(lab_proxy_requests_total)")[0]["value"][1]) > float(before),
        what="rates have two points",
    )
    missing = []
    for query, legend in (each.values for each in QUERIES):
        if QUIET & set(NAME.findall(query)):
            continue
        found = ask(prometheus, query.replace("$__rate_interval", "5m"))
        wanted = set(re.findall(r"\{\{(\w+)\}\}", legend))
        # An empty label, such as the cache outcome of a refused request, is none to Prometheus.
        if not any(wanted <= set(series["metric"]) for series in found):
            missing.append(query)
    assert not missing, "\n".join(missing)


def test_prometheus_takes_the_alerts(prometheus: Process) -> None:
    with httpx2.Client(timeout=30) as client:
        groups = client.get(f"{prometheus.url}/api/v1/rules").json()["data"]["groups"]
    assert {rule["name"] for group in groups for rule in group["rules"]} == {rule["alert"] for rule in RULES}
    assert {rule["health"] for group in groups for rule in group["rules"]} <= {"ok", "unknown"}
