"""The catalogue: sources, sizes before loading, downloads, and which models are in memory."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import struct
import subprocess
import time
import types
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import tiny
import yaml
from lab_model import cli
from lab_model.errors import CatalogueError, UnavailableError
from lab_model.models import fetching
from lab_model.models.catalogue import AppArgs, Entry, added_entries, load_catalogue
from lab_model.models.progress import Progress, Step, read_progress
from lab_model.models.sizes import PROCESS_BYTES, Size, size_of
from lab_model.models.sources import FileDigests, Source, hub_name, resolve_source
from lab_model.serving import lifecycle
from lab_model.serving.activity import ObservedApp, read_activity
from lab_model.serving.copies import announce, check_room, read_free
from lab_model.serving.lifecycle import Lifecycle, LifecycleArgs
from mirror import COMMIT, Mirror, mirror
from processes import Process, eventually, eventually_async, free_port, process, python
from served import MODEL_START_SECONDS

REPOSITORY = "somebody/tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return tiny.write(tmp_path_factory.mktemp("tiny"))


# Sources and sizes


@pytest.mark.parametrize(
    ("source", "repository", "file", "revision"),
    [
        ("hub:a/b", "a/b", None, "main"),
        ("hub:a/b@v1", "a/b", None, "v1"),
        ("hub:a/b/c.gguf", "a/b", "c.gguf", "main"),
        ("hub:a/b/deep/c.gguf@0123", "a/b", "deep/c.gguf", "0123"),
    ],
)
def test_a_hubs_model_has_a_file_and_a_revision(source: str, repository: str, file: str | None, revision: str) -> None:
    assert hub_name(source) == (repository, file, revision)


@pytest.mark.parametrize("source", ["hub:a", "hub:a/b/c", "hub:../b", "hub:a/..", "hub:a/b@../x", "hub:a b/c"])
def test_other_names_of_a_hub_are_refused(source: str) -> None:
    with pytest.raises(CatalogueError, match="hub:<owner>/<name>"):
        hub_name(source)


def test_modelscope_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text("- {id: a, kind: chat, source: 'modelscope:qwen/x'}")
    with pytest.raises(CatalogueError, match=r"entry 0.source: .*modelscope: is not supported"):
        load_catalogue(path)


def test_sizes_are_known_before_loading(folder: Path, source: Source) -> None:
    """Of safetensors and of GGUF: parameters, and bytes as the runners hold them."""
    entry = Entry(id="a", kind="chat", source=f"file:{folder}", dtype="float32")
    found = size_of(entry, resolve_source(entry))
    model = tiny.model()
    assert found.parameters == sum(each.numel() for each in model.parameters())
    assert (found.weights, found.context) == (4 * found.parameters, tiny.CONTEXT)
    assert found.token == 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, width, float32
    embedded = load_catalogue(None)[0]
    found = size_of(embedded, source)
    assert found.parameters == 134_515_008
    assert found.token == 23040
    assert 85e6 < found.weights < 115e6


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_a_truncated_safetensors_is_refused_before_loading(folder: Path, tmp_path: Path, keep: int) -> None:
    copy = shutil.copytree(folder, tmp_path / "m")
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:keep])
    entry = Entry(id="a", kind="chat", source=f"file:{copy}")
    with pytest.raises(CatalogueError, match=r"a: .*model.safetensors is cut short"):
        size_of(entry, resolve_source(entry))


def test_digests_are_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = FileDigests(tmp_path)
    one = first.of(file)
    first.save()
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("it is read again"))
    assert FileDigests(tmp_path).of(file) == one
    monkeypatch.undo()
    file.write_bytes(b"two")
    os.utime(file, ns=(0, 0))
    assert FileDigests(tmp_path).of(file) != one


# Downloads


@pytest.fixture
def hub(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    """A mirror with one model, which this process takes for the hub."""
    place = tmp_path / "hub" / REPOSITORY
    shutil.copytree(folder, place)
    (place / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    (place / "pytorch_model.bin").write_bytes(b"pickle")
    with mirror(tmp_path / "hub") as made:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", made.url)
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", made.url, raising=False)
        template = f"{made.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for module in ("constants", "file_download"):
            monkeypatch.setattr(f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        yield made


def test_add_fetches_checks_and_lists(hub: Mirror, tmp_path: Path) -> None:
    """With progress; pickled weights are not fetched; kind and licence come from the model's files."""
    steps: list[tuple[str, float | None]] = []
    place = tmp_path / "folder"
    (entry,) = fetching.add(f"{REPOSITORY}@main", place, lambda *step: steps.append(step))
    assert (entry.id, entry.kind, entry.licence, entry.load) == ("tiny", "chat", "apache-2.0", "demand")
    assert added_entries(place) == [entry]
    assert load_catalogue(None, place)[-1] == entry
    source = resolve_source(entry, place)
    assert source.commit == COMMIT
    assert "pytorch_model.bin" not in hub.sent
    shares = [share for what, share in steps if what == "download" and share is not None]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    # Again: nothing is fetched twice.
    sent = len(hub.sent)
    assert fetching.add(REPOSITORY, place, lambda *_: None) == [
        entry.model_copy(update={"source": f"hub:{REPOSITORY}"})
    ]
    assert len(hub.sent) == sent


def test_a_broken_connection_and_a_killed_download_are_resumed(hub: Mirror, tmp_path: Path) -> None:
    hub.cut = 5000
    fetching.add(REPOSITORY, tmp_path / "folder", lambda *_: None)
    assert hub.ranges == ["bytes=5000-"]
    # What a killed process has left.
    whole = tmp_path / "folder/hub/somebody--tiny" / COMMIT / "model.safetensors"
    data = whole.read_bytes()
    whole.unlink()
    whole.with_name("model.safetensors.part").write_bytes(data[:7000])
    fetching.add(REPOSITORY, tmp_path / "folder", lambda *_: None)
    assert hub.ranges[1:] == ["bytes=7000-"]
    assert whole.read_bytes() == data


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_file_with_another_digest_is_removed(hub: Mirror, tmp_path: Path, file: str) -> None:
    hub.spoiled = {file}
    with pytest.raises(CatalogueError, match=f"{file} of {REPOSITORY} had a wrong digest"):
        fetching.add(REPOSITORY, tmp_path / "folder", lambda *_: None)
    assert added_entries(tmp_path / "folder") == []
    assert not list((tmp_path / "folder").rglob(f"{file}*"))


def test_a_hub_says_no(hub: Mirror, tmp_path: Path) -> None:
    """An unknown model, pickled weights alone, a file that is not there, modelscope: one line each."""
    pickled = tmp_path / "hub/somebody/pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")
    for name, said in (
        ("somebody/none", "it does not exist"),
        ("somebody/pickled", "has no .safetensors file"),
        (f"{REPOSITORY}/x.gguf", "has no file x.gguf"),
        ("modelscope:somebody/tiny", "modelscope: is not supported"),
        ("nonsense", r"no short name \(.*korean.*\) and no local folder; .* hub:<owner>/<name>"),
    ):
        with pytest.raises(CatalogueError, match=said):
            fetching.add(name, tmp_path / "folder", lambda *_: None)


def test_a_full_disk_is_told_before_the_download(hub: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=5 << 20))
    with pytest.raises(
        CatalogueError, match=r"needs 0 MiB of disk and 200 MiB more must stay free, but .* has 5 MiB free"
    ):
        fetching.add(REPOSITORY, tmp_path / "folder", lambda *_: None)
    assert hub.sent == []


def test_a_second_add_is_refused_while_one_runs(hub: Mirror, tmp_path: Path) -> None:
    place = tmp_path / "folder"
    place.mkdir()
    with (place / fetching.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        with pytest.raises(CatalogueError, match=r"another model is being added .process 4711."):
            fetching.add(REPOSITORY, place, lambda *_: None)
    fetching.add(REPOSITORY, place, lambda *_: None)


def test_a_model_with_code_of_its_own_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "own")
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "modeling_mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CatalogueError, match=r"needs Python code of its own .trust_remote_code., which is never run"):
        fetching.add(str(copy), tmp_path / "folder", lambda *_: None)
    assert not (tmp_path / "ran").exists()


def test_the_short_names_are_models_or_sets() -> None:
    table = fetching.known()
    assert set(table.sets) == {"lecture", "korean"}
    assert all(name in table.models for members in table.sets.values() for name in members)
    assert table.models["gemma3-270m"].wheels


def test_the_command_line_lists_and_adds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODEL_FOLDER", str(tmp_path / "kept"))
    assert cli.main(["add", str(folder)]) == 0
    assert cli.main(["list"]) == 0
    assert folder.name in capsys.readouterr().out
    assert cli.main(["add", str(tmp_path / "nothing" / "here")]) == 1
    assert "hub:<owner>/<name>" in capsys.readouterr().err
    monkeypatch.delenv("MODEL_FOLDER")
    assert cli.main(["add", "gpt2"]) == 1
    assert "MODEL_FOLDER is not set" in capsys.readouterr().err


# Which models are in memory: the decisions, with Serve's answers in the test's hand


class Applications:
    """In place of Serve's: all are up at once."""

    def __init__(self) -> None:
        self.now: dict[str, Any] = {}
        self.deployed: list[str] = []

    async def list(self) -> dict[str, Any]:
        return dict(self.now)

    async def deploy(self, args: AppArgs) -> None:
        self.deployed.append(args.entry.id)
        self.now[args.entry.id] = types.SimpleNamespace(status="RUNNING", reason="")

    async def delete(self, name: str) -> None:
        del self.now[name]

    async def info(self, name: str) -> dict[str, Any]:
        return {"id": name, "revision": f"of {name}"}


EACH = 1 << 30  # bytes that each of the models takes


@pytest.fixture
async def made(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Lifecycle, Applications, Path]]:
    """A lifecycle of three models of which two fit into memory: `one` is loaded at the start, two more on demand."""
    serve = Applications()
    monkeypatch.setattr(lifecycle, "BUSY_SECONDS", 0.01)
    monkeypatch.setattr(lifecycle, "IDLE_SECONDS", 0.02)
    sizes = {"one": EACH, "two": EACH, "three": EACH, "huge": 9 * EACH}
    monkeypatch.setattr(lifecycle, "size_of", lambda entry, _: Size(1, 1, sizes[entry.id] - PROCESS_BYTES))
    monkeypatch.setattr(lifecycle, "memory_budget", lambda *_: 2 * EACH + EACH // 2)
    rows = [{"id": id_, "kind": "chat", "source": f"file:{folder}", "load": "demand"} for id_ in sizes]
    rows[0]["load"] = "start"
    path = tmp_path / "models.yaml"
    path.write_text(yaml.safe_dump(rows))
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    shared = {"metrics_dir": metrics, "log_pipe": tmp_path / "none"}
    args = LifecycleArgs(catalogue_file=path, shared=shared, service=os.getpid(), wake=tmp_path / "wake", offline=True)
    one = Lifecycle(args, serve, lambda _: None)
    await eventually_async(lambda: one.models["one"].state == "ready")
    yield one, serve, metrics
    for task in one._tasks:
        task.cancel()


def soon() -> float:
    return time.monotonic() + 60


async def test_the_least_recently_used_goes(made: tuple[Lifecycle, Applications, Path]) -> None:
    one, serve, metrics = made
    await one.ensure_ready("two", soon())

    async def app(*_: Any) -> None:
        pass

    for id_ in ("two", "one"):  # their requests, in this order
        await ObservedApp(app, metrics, id_)({"type": "http"}, None, None)  # type: ignore[arg-type]
    await one.ensure_ready("three", soon())
    assert {id_: model.state for id_, model in one.models.items()} == {
        "one": "ready",
        "two": "unloaded",
        "three": "ready",
        "huge": "unloaded",
    }
    assert set(serve.now) == {"one", "three"}
    assert one.report()["two"]["revision"] == "of two"  # so that cached answers are still found


async def test_a_busy_model_is_not_unloaded(made: tuple[Lifecycle, Applications, Path]) -> None:
    """A request for another one waits, and tells why when its time is over; it is loaded once the others are idle."""
    one, _, metrics = made
    await one.ensure_ready("two", soon())
    release = asyncio.Event()

    async def app(*_: Any) -> None:
        await release.wait()

    running = [
        asyncio.create_task(ObservedApp(app, metrics, id_)({"type": "http"}, None, None))  # type: ignore[arg-type]
        for id_ in ("one", "two")
    ]
    await asyncio.sleep(0)
    with pytest.raises(UnavailableError, match="waits for memory; the other models are busy") as refused:
        await one.ensure_ready("three", time.monotonic() + 0.3)
    assert int(refused.value.headers["retry-after"]) >= 1
    release.set()
    await asyncio.gather(*running)
    await one.ensure_ready("three", soon())


async def test_what_can_never_fit_is_refused_before_loading(made: tuple[Lifecycle, Applications, Path]) -> None:
    one, serve, _ = made
    with pytest.raises(UnavailableError, match=r"needs at least 9216 MiB of memory, .* may take only 2560 MiB"):
        await one.ensure_ready("huge", soon())
    assert one.models["one"].state == "ready"
    assert "huge" not in serve.deployed


async def test_a_second_copy_counts_in_the_memory(made: tuple[Lifecycle, Applications, Path]) -> None:
    """A copy for the layers' pages is refused where there is no room for it; one that runs takes room from others."""
    one, _, metrics = made
    needed = Size(1, 1, 0).copy
    await eventually_async(lambda: read_free(metrics) == EACH + EACH // 2)
    check_room(metrics, "one", EACH)
    await one.ensure_ready("two", soon())
    await eventually_async(lambda: read_free(metrics) == EACH // 2)
    with pytest.raises(UnavailableError, match=r"copy of one with 1024 MiB of memory, but only 512 MiB"):
        check_room(metrics, "one", EACH)
    announce(metrics, "one")  # this process stands for the copy's
    (metrics / "two.999999999.copy").touch()  # of a process that has ended
    await eventually_async(lambda: read_free(metrics) == EACH // 2 - needed)
    check_room(metrics, "one", EACH)  # it runs
    with pytest.raises(UnavailableError):
        check_room(metrics, "two", EACH)


async def test_an_idle_model_is_unloaded(made: tuple[Lifecycle, Applications, Path]) -> None:
    one, serve, _ = made
    model = one.models["one"]
    model.entry = model.entry.model_copy(update={"idle_minutes": 1e-6})
    await eventually_async(lambda: model.state == "unloaded" and "one" not in serve.now)
    model.entry = model.entry.model_copy(update={"idle_minutes": None})
    await one.ensure_ready("one", soon())


async def test_running_models_are_taken_over(made: tuple[Lifecycle, Applications, Path]) -> None:
    """The catalogue's application was restarted: what runs is not deployed again."""
    one, serve, _ = made
    await one.ensure_ready("two", soon())
    again = Lifecycle(one._args, serve, lambda _: None)
    await eventually_async(lambda: {again.models[id_].state for id_ in ("one", "two")} == {"ready"})
    assert serve.deployed == ["one", "two"]
    for task in again._tasks:
        task.cancel()


def test_progress_and_activity_pass_through_files(tmp_path: Path) -> None:
    Progress(tmp_path / "p").report("weights", 0.5)
    assert read_progress(tmp_path / "p") == Step("weights", 50)
    assert read_progress(tmp_path / "none") is None
    (tmp_path / "m.999999999.activity").write_bytes(struct.pack("<qd", 3, 5.0))
    assert read_activity(tmp_path, "m") == (0, 0.0), "a dead process has no requests"


# A real service


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[tuple[Process, Path]]:
    """One model that runs, one on demand, and some of every kind of fault."""
    root = tmp_path_factory.mktemp("service")
    cut = shutil.copytree(folder, root / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    bare = shutil.copytree(folder, root / "bare")
    for each in bare.glob("tokenizer*"):
        each.unlink()
    own = shutil.copytree(folder, root / "own")
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": {"AutoConfig": "m.C"}}))
    large = shutil.copytree(folder, root / "large")
    header = json.dumps({"w": {"dtype": "BF16", "shape": [10**6, 10**6], "data_offsets": [0, 2 * 10**12]}}).encode()
    with (large / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * 10**12)  # a sparse file
    rows = [
        {"id": "runs", "kind": "chat", "source": f"file:{folder}", "dtype": "float32"},
        {"id": "asleep", "kind": "base", "source": f"file:{folder}", "dtype": "float32", "load": "demand"},
        {"id": "gone", "kind": "chat", "source": f"file:{root}/none"},
        {"id": "cut", "kind": "chat", "source": f"file:{cut}"},
        {"id": "large", "kind": "chat", "source": f"file:{large}"},
        {"id": "own", "kind": "chat", "source": f"file:{own}", "load": "demand"},
        {"id": "bare", "kind": "chat", "source": f"file:{bare}", "load": "demand"},
    ]
    path = root / "models.yaml"
    path.write_text(yaml.safe_dump(rows))
    port = free_port()
    env = {"MODEL_PORT": str(port), "MODEL_CATALOGUE_FILE": str(path), "MODEL_FOLDER": str(root / "kept")}
    with process(
        "model", python("lab_model"), port=port, log_dir=root, env=env, ready="/ready", timeout=MODEL_START_SECONDS
    ) as started:
        yield started, root


def states(url: str) -> dict[str, str]:
    return {model["id"]: model["state"] for model in httpx2.get(f"{url}/v1/models", timeout=60).json()["data"]}


def complete(url: str, model: str, **headers: str) -> httpx2.Response:
    body = {"model": model, "prompt": "hi", "max_tokens": 2}
    return httpx2.post(f"{url}/v1/completions", json=body, headers=headers, timeout=MODEL_START_SECONDS)


def test_one_failing_model_stops_nobody(service: tuple[Process, Path]) -> None:
    started, _ = service
    ready = httpx2.get(f"{started.url}/ready", timeout=60).json()
    assert ready["status"] == "degraded"
    found = {model["id"]: model for model in ready["models"]}
    assert {id_: model["state"] for id_, model in found.items()} == {
        "runs": "ready",
        "asleep": "unloaded",
        "gone": "absent",
        "cut": "failed",
        "large": "failed",
        "own": "unloaded",
        "bare": "unloaded",
    }
    assert "does not exist" in found["gone"]["detail"]
    assert "model.safetensors is cut short" in found["cut"]["detail"]
    assert "MODEL_MEMORY_BYTES" in found["large"]["detail"]
    assert complete(started.url, "runs").status_code == 200
    for id_ in ("gone", "cut", "large"):
        refused = complete(started.url, id_)
        assert refused.status_code == 503
        assert found[id_]["detail"] in refused.json()["error"]["message"]
    log = started.log.read_text()
    assert "runs is loading: starts its process" in log
    assert "cut cannot be loaded: " in log


def test_the_card_tells_what_a_model_is(service: tuple[Process, Path]) -> None:
    card = httpx2.get(f"{service[0].url}/v1/models/runs", timeout=60).json()
    assert card["endpoints"][:2] == ["/v1/chat/completions", "/v1/completions"]
    assert "/v1/inspect/score" in card["endpoints"]
    assert card["parameters"] == sum(each.numel() for each in tiny.model().parameters())
    assert card["engine"] == "LlamaRunner float32"
    assert card["disk_bytes"] > 4 * card["parameters"]
    assert card["predicted_bytes"] > PROCESS_BYTES
    assert card["memory_bytes"] > 50e6
    assert {"revision", "context", "load", "state"} <= set(card)


def test_a_request_loads_a_model_and_waits_for_it(service: tuple[Process, Path]) -> None:
    """Until its deadline at most; then the operator unloads it."""
    url = service[0].url
    late = complete(url, "asleep", **{"x-request-timeout-ms": "50"})
    assert late.status_code == 504
    assert complete(url, "asleep").status_code == 200
    assert states(url)["asleep"] == "ready"
    assert httpx2.post(f"{url}/models/unload", json={"model": "asleep"}, timeout=60).status_code == 202
    assert states(url)["asleep"] == "unloaded"
    assert httpx2.post(f"{url}/models/load", json={"model": "asleep"}, timeout=60).status_code == 202
    eventually(lambda: states(url)["asleep"] == "ready", MODEL_START_SECONDS)
    unknown = httpx2.post(f"{url}/models/load", json={"model": "none"}, timeout=60)
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


def test_own_code_and_a_missing_tokenizer_are_told(service: tuple[Process, Path]) -> None:
    url = service[0].url
    for id_, said in (("own", "which is never run"), ("bare", "tokenizer")):
        refused = complete(url, id_)
        assert refused.status_code == 503
        assert said in refused.json()["error"]["message"]
    assert complete(url, "runs").status_code == 200


def test_an_added_model_answers_without_a_restart(service: tuple[Process, Path], folder: Path) -> None:
    started, root = service
    copy = shutil.copytree(folder, root / "newcomer")
    env = os.environ | {"MODEL_FOLDER": str(root / "kept")}
    subprocess.run(python("lab_model.cli", "add", str(copy)), env=env, check=True, timeout=120)
    eventually(lambda: states(started.url).get("newcomer") == "unloaded", what="the list is read")
    assert complete(started.url, "newcomer").status_code == 200
    refused = httpx2.post(f"{started.url}/models/add", json={"model": "/etc"}, timeout=60)
    assert refused.status_code == 400
