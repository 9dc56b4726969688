"""The lab as a fixture: real processes on free ports, started once when the first test asks for them.

LAB_TEST_PROXY_URL and LAB_TEST_MODEL_URL run the contract suite against services that run already (containers).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
import tiny
import yaml
from fixtures_proxy import PATIENT_MS, bench, running  # noqa: F401 - fixtures of the proxy's tests
from processes import (
    ANSWERS,
    ENDED,
    RUNNING,
    SHOWN_ON_FAILURE,
    Process,
    describe,
    free_port,
    process,
    python,
    redis_server,
)
from served import MODEL_START_SECONDS, PAIR, TINY

if TYPE_CHECKING:
    from _pytest.tmpdir import TempPathFactory
    from collector import Collector
    from lab_model.models.sources import Source
    from lab_model.weights.gguf import GGUFFile


# Fixtures behind which stands the one Ray session: whatever asks for them runs on one worker, one after the other.
RAY = {"model_process", "model_url", "proxy_url", "lab", "target", "model_to_stop"}
# The group's last: a test that asks for it ends the Ray session.
LAST = "model_to_stop"
# Groups that take longest begin first, so that the workers end together.
LONGEST_FIRST = ("ray", "test_ui", "test_lab")


# -- distribution over pytest-xdist's workers


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One group a file, whose tests share its fixtures; and the group `ray` of all tests that use the Ray session."""
    rank = {name: place for place, name in enumerate(LONGEST_FIRST)}
    groups: dict[pytest.Item, str] = {}
    for item in items:
        groups[item] = "ray" if RAY & set(getattr(item, "fixturenames", ())) else item.path.stem
        item.add_marker(pytest.mark.xdist_group(groups[item]))
    items.sort(key=lambda item: (rank.get(groups[item], len(rank)), LAST in getattr(item, "fixturenames", ())))


class _Grouped:
    """Runs after pytest-xdist has written the groups into the tests' ids."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if getattr(config.option, "loadgroup", False) and any("@" not in item.nodeid for item in items):
            pytest.exit("pytest-xdist does not group the tests: is pytest older than 9.2?", returncode=3)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Grouped())


# -- what a failure shows


_log_sizes: dict[Path, int] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    _log_sizes.clear()
    _log_sizes.update({each.log: each.log.stat().st_size for each in RUNNING if each.log.exists()})
    ANSWERS.clear()
    ENDED.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to a failure what the processes logged since the test began, and the last HTTP answers."""
    report = yield
    if report.failed:
        for each in [*ENDED, *RUNNING]:
            if lines := each.logged_since(_log_sizes.get(each.log, 0)):
                report.sections.append((f"log of {each.name} on port {each.port}", lines))
        if ANSWERS:
            report.sections.append(("last HTTP answers", "\n".join(describe(answer) for answer in ANSWERS)))
    return report


# -- one closing line for a lane of several pytest calls (lab/checks.py)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Append this call's counts to the file in LAB_TEST_COUNTS, as a line of JSON."""
    path = os.environ.get("LAB_TEST_COUNTS")
    if path and not hasattr(terminalreporter.config, "workerinput"):  # pytest-xdist's workers count for themselves, too
        counts = {name: len(found) for name, found in terminalreporter.stats.items() if name}
        with Path(path).open("a") as file:
            file.write(json.dumps(counts) + "\n")


@dataclass(frozen=True)
class Lab:
    ui_url: str
    proxy_url: str
    model_url: str
    redis_url: str


@pytest.fixture(scope="session")
def logs(tmp_path_factory: TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="session")
def catalogue(logs: Path) -> Path:
    """The packaged catalogue, and beside it tiny models for what needs speed rather than sense."""
    packaged = Path(__file__).parents[1] / "services/model/lab_model/models/models.yaml"
    folder = tiny.write(logs / "tiny")
    endless = tiny.lengthen(shutil.copytree(folder, logs / "pair"))
    added = [
        {"id": TINY, "kind": "chat", "source": f"file:{folder}", "dtype": "float32"},
        {"id": PAIR, "kind": "chat", "source": f"file:{endless}", "dtype": "float32", "replicas": 2},
    ]
    path = logs / "models.yaml"
    path.write_text(yaml.safe_dump([*yaml.safe_load(packaged.read_text()), *added]))
    return path


@pytest.fixture(scope="session")
def redis(logs: Path) -> Iterator[Process]:
    with redis_server(logs) as started:
        yield started


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Takes the spans of the model service, which has traces on in all tests."""
    from collector import collecting  # here: the contract's container has no OpenTelemetry

    with collecting() as found:
        yield found


@pytest.fixture(scope="session")
def model_process(logs: Path, request: pytest.FixtureRequest) -> Iterator[Process]:
    """A real Ray Serve of its own, beside whatever else runs on this machine."""
    if os.environ.get("LAB_TEST_MODEL_URL"):
        pytest.skip("the model service runs elsewhere: its process and its log are not here")
    port = free_port()
    env = {"MODEL_PORT": str(port), "MODEL_CATALOGUE_FILE": str(request.getfixturevalue("catalogue"))}
    env["OTEL_EXPORTER_OTLP_ENDPOINT"] = request.getfixturevalue("collector").url
    with process(
        "model", python("lab_model"), port=port, log_dir=logs, env=env, ready="/ready", timeout=MODEL_START_SECONDS
    ) as started:
        yield started


@pytest.fixture
def model_to_stop(model_process: Process) -> Process:
    """The same, for the test that ends it: of the tests that use the Ray session it runs last."""
    return model_process


@pytest.fixture(scope="session")
def model_url(request: pytest.FixtureRequest) -> str:
    return os.environ.get("LAB_TEST_MODEL_URL") or str(request.getfixturevalue("model_process").url)


@pytest.fixture(scope="session")
def proxy_url(logs: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    if given := os.environ.get("LAB_TEST_PROXY_URL"):
        yield given
        return
    model_url = request.getfixturevalue("model_url")
    redis = request.getfixturevalue("redis")
    port = free_port()
    env = {
        "PROXY_PORT": str(port),
        "PROXY_MODEL_URL": model_url,
        "PROXY_REDIS_URL": f"redis://127.0.0.1:{redis.port}/0",
        "PROXY_CACHE_SECRET_FILE": str(logs / "cache-secret"),
        "PROXY_REDIS_TIMEOUT_MS": PATIENT_MS,
    }
    with process("proxy", python("lab_proxy"), port=port, log_dir=logs, env=env, ready="/ready") as started:
        yield started.url


@pytest.fixture(scope="session")
def lab(logs: Path, model_url: str, proxy_url: str, redis: Process) -> Iterator[Lab]:
    """All four services."""
    port = free_port()
    env = {"UI_PORT": str(port), "UI_PROXY_URL": proxy_url, "UI_PUBLIC_PROXY_URL": proxy_url}
    with process("ui", python("lab_ui"), port=port, log_dir=logs, env=env, ready="/_stcore/health") as started:
        yield Lab(started.url, proxy_url, model_url, f"redis://127.0.0.1:{redis.port}/0")


@pytest.fixture(params=["model", "proxy"])
def target(request: pytest.FixtureRequest) -> str:
    """The base URL of a service that speaks OpenAI's API: every contract test runs against both."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def client(target: str) -> Iterator[openai.OpenAI]:
    with (
        openai.DefaultHttpxClient(event_hooks=SHOWN_ON_FAILURE) as http,
        openai.OpenAI(base_url=f"{target}/v1", api_key="any", max_retries=0, timeout=60, http_client=http) as made,
    ):
        yield made


# -- the embedded model's file. Imported where they are asked for: torch takes seconds.


@pytest.fixture(scope="session")
def source() -> Source:
    from lab_model.models.catalogue import load_catalogue
    from lab_model.models.sources import resolve_source

    return resolve_source(load_catalogue(None)[0])


@pytest.fixture(scope="session")
def file(source: Source) -> GGUFFile:
    from lab_model.weights.gguf import GGUFFile

    assert source.gguf_file
    return GGUFFile(Path(source.folder) / source.gguf_file)


@pytest.fixture(scope="session")
def reference(source: Source) -> Any:
    """transformers' own reading, dequantized to float32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    config = GgufConfig(gguf_file=source.gguf_file, dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        source.folder, gguf_file=source.gguf_file, dtype=torch.float32, quantization_config=config
    ).eval()
