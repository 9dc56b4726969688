"""/v1/files and /v1/batches with the official client, real processes and a real redis; a kill in the middle.

To stop a batch at a known place its first lines go to the model service, which answers, and the others to the paid
upstream, whose answers wait at a gate (`ground.gate`): then as many lines are in flight as the proxy asks at once, and
all lines before them are done.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import redis
from fixtures_keys import changed
from fixtures_proxy import CHAT_MODEL, mock, new, proxy, redis_url
from lab_proxy.batches import worker
from lab_proxy.keys.limits import PREFIX
from openai.types import Batch
from processes import SHOWN_ON_FAILURE, Process, eventually, redis_server

CHAT = "/v1/chat/completions"
ADMIN_KEY = "adm-T9vXq2LmZ7wRk4Ny8Bc3"
AT_ONCE = 4  # lines that a proxy asks at the same time: PROXY_BATCH_CONCURRENCY as shipped


@dataclass
class Place:
    """What a proxy with batches stands on."""

    paid: Process
    model: Process
    redis: Process
    folder: Path
    http: httpx2.Client

    @contextlib.contextmanager
    def proxy(self, folder: Path | None = None, **settings: str) -> Iterator[Process]:
        folder = folder or self.folder
        with proxy(
            self.folder, redis=redis_url(self.redis), model=self.model.url, paid=self.paid.url,
            files_dir=str(folder / "files"), **settings,
        ) as started:  # fmt: skip
            yield started

    def calls(self, of: Process | None = None) -> int:
        """Calls to the paid upstream, unless another is named."""
        return int(self.http.get(f"{(of or self.paid).url}/calls").json()["total"])

    def control(self, **values: Any) -> None:
        """Of the paid upstream."""
        self.http.post(f"{self.paid.url}/control", json=values)

    @contextlib.contextmanager
    def gate(self) -> Iterator[None]:
        """Answers of the paid upstream wait until the end of the block."""
        self.control(closed=True)
        try:
            yield
        finally:
            self.control(closed=False)

    def in_flight(self) -> None:
        """Wait until the gate holds as many lines as a proxy asks at once."""
        eventually(lambda: self.calls() >= AT_ONCE, what=f"{AT_ONCE} lines at the gate")

    def lose_lease(self, batch_id: str) -> None:
        """As if the time of a dead worker's lease had passed."""
        with contextlib.closing(redis.Redis(port=self.redis.port)) as db:
            assert db.delete(worker.LEASE + batch_id) == 1

    def left(self, batch_id: str) -> list[str]:
        """The files of a batch. Its worker removes all but its state, which stays for the API."""
        return [path.name for path in (self.folder / "files").rglob(f"*{batch_id}*") if path.is_file()]


@contextlib.contextmanager
def stopped(each: Process) -> Iterator[None]:
    """The process does nothing until the end of the block."""
    each.popen.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        each.popen.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("batches")
    with mock(folder) as paid, mock(folder) as model, redis_server(folder) as server, httpx2.Client(timeout=60) as http:
        yield Place(paid, model, server, folder, http)


@pytest.fixture(scope="module")
def shared(ground: Place) -> Iterator[Process]:
    """One proxy for the tests that end no process."""
    with ground.proxy(max_body_bytes="100000", files_max_bytes="200000", files_total_bytes="800000") as started:
        yield started


@pytest.fixture(scope="module")
def keyed(ground: Place) -> Iterator[Process]:
    """One proxy that asks for keys, with files of its own."""
    with ground.proxy(ground.folder / "keyed", admin_key=ADMIN_KEY) as started:
        yield started


@pytest.fixture
def admin(keyed: Process) -> Iterator[httpx2.Client]:
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    with httpx2.Client(base_url=keyed.url, headers=headers, timeout=60, event_hooks=SHOWN_ON_FAILURE) as http:
        yield http


@pytest.fixture(autouse=True)
def fresh(ground: Place) -> None:
    for each in (ground.paid, ground.model):
        ground.http.post(f"{each.url}/reset")


def sdk(url: str, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture
def client(shared: Process) -> Iterator[openai.OpenAI]:
    with sdk(shared.url) as made:
        yield made


def line(custom_id: str, url: str = CHAT, method: str = "POST", **body: Any) -> dict[str, Any]:
    asked = {"model": "gpt-mock", "messages": [{"role": "user", "content": new()}], "temperature": 0} | body
    return {"custom_id": custom_id, "method": method, "url": url, "body": asked}


def partly_held(done: int, more: int) -> list[dict[str, Any]]:
    """`done` lines for the model service and `more` for the paid upstream. Sampled: the cache hides no second call."""
    return [line(f"q{n}", model=CHAT_MODEL if n < done else "gpt-mock", temperature=1) for n in range(done + more)]


def jsonl(lines: list[Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def start(client: openai.OpenAI, lines: list[Any], endpoint: Any = CHAT, **more: Any) -> Batch:
    given = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    return client.batches.create(input_file_id=given.id, endpoint=endpoint, completion_window="24h", **more)


def wait(client: openai.OpenAI, batch_id: str) -> Batch:
    """Until the batch is over."""
    over = {"completed", "failed", "expired", "cancelled"}
    eventually(lambda: client.batches.retrieve(batch_id).status in over, what="the end of the batch")
    return client.batches.retrieve(batch_id)


def rows(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    """By custom_id; no id twice."""
    if file_id is None:
        return {}
    told = [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
    found = {each["custom_id"]: each for each in told}
    assert len(found) == len(told)
    return found


# ---- files


def test_files_make_the_round(client: openai.OpenAI) -> None:
    """Uploaded, listed, retrieved, read and deleted with the SDK; byte for byte what was sent."""
    content = b'{"a": "\xc3\xa9"}\r\n\r\n--not a boundary\n' * 50
    made = client.files.create(file=("my questions.jsonl", content), purpose="batch")
    assert (made.bytes, made.filename, made.purpose, made.object) == (
        len(content), "my questions.jsonl", "batch", "file",
    )  # fmt: skip
    assert made.expires_at == made.created_at + 30 * 86_400
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == content
    assert made in list(client.files.list(purpose="batch"))
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError) as gone:
        client.files.retrieve(made.id)
    assert gone.value.code == "file_not_found"


def test_files_are_listed_by_pages(client: openai.OpenAI) -> None:
    made = [client.files.create(file=(f"{n}.jsonl", b"x"), purpose="batch").id for n in range(5)]
    assert set(made) <= {each.id for each in client.files.list(limit=2)}
    first = client.files.list(limit=1)
    assert first.has_next_page()
    with pytest.raises(openai.BadRequestError):
        client.files.list(after="file-nobody")


@pytest.mark.parametrize("file_id", ["file-x", "..%2f..%2fetc%2fpasswd", "%2e%2e", "file-" + "0" * 32, ""])
def test_no_other_file_is_reached(shared: Process, file_id: str) -> None:
    for rest in ("", "/content", "/../x"):
        assert httpx2.get(f"{shared.url}/v1/files/{file_id}{rest}").status_code == 404


def test_uploads_are_bounded_and_refused_by_name(client: openai.OpenAI, shared: Process) -> None:
    with pytest.raises(openai.APIStatusError) as large:
        client.files.create(file=("a", b"x" * 200_001), purpose="batch")
    assert (large.value.status_code, large.value.code) == (413, "request_too_large")
    with pytest.raises(openai.BadRequestError) as purpose:
        client.files.create(file=("a", b"x"), purpose="fine-tune")
    assert purpose.value.param == "purpose"
    with pytest.raises(openai.BadRequestError) as short:
        client.files.create(file=("a", b"x"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 5})
    assert short.value.param == "expires_after"
    form = {"content-type": "multipart/form-data; boundary=b"}
    for headers, body, status in (
        (form, b"--b\r\ncontent-disposition: form-data; name=", 400),
        (form, b"no form at all", 400),
        (form, b"--b\r\ncontent-disposition: form-data; name=purpose\r\n\r\nbatch\r\n--b--\r\n", 400),
        ({"content-type": "multipart/form-data"}, b"", 415),
        ({"content-type": "application/json"}, b"{}", 415),
    ):
        answer = httpx2.post(f"{shared.url}/v1/files", content=body, headers=headers)
        assert (answer.status_code, bool(answer.json()["error"]["message"])) == (status, True), body


def test_an_owners_files_are_bounded_together(client: openai.OpenAI) -> None:
    made: list[str] = []

    def fill() -> None:
        for _ in range(5):
            made.append(client.files.create(file=("a", b"x" * 190_000), purpose="batch").id)  # noqa: PERF401 it raises

    with pytest.raises(openai.APIStatusError) as full:
        fill()
    assert (full.value.status_code, full.value.code, len(made) > 1) == (413, "file_storage_full", True)
    for file_id in made:
        client.files.delete(file_id)
    assert client.files.create(file=("a", b"x"), purpose="batch").bytes == 1


# ---- batches


def test_a_batch_is_worked_off(client: openai.OpenAI) -> None:
    """Answers in the output file, refusals in the errors file, every line in one of them; in OpenAI's shapes."""
    lines = [line(f"q{n}", model="gpt-mock-pretty" if n % 2 else "gpt-mock") for n in range(20)]
    lines += [line("lost", model="nobody"), line("refused", model="gpt-mock-403")]
    given = start(client, lines, metadata={"who": "me"})
    assert (given.status, given.object, given.endpoint) == ("validating", "batch", CHAT)
    assert given.expires_at == given.created_at + 86_400
    done = wait(client, given.id)
    assert (done.status, done.metadata) == ("completed", {"who": "me"})
    assert done.request_counts is not None
    assert done.request_counts.model_dump() == {"total": 22, "completed": 20, "failed": 2}
    answers, failures = rows(client, done.output_file_id), rows(client, done.error_file_id)
    assert set(answers) == {f"q{n}" for n in range(20)}
    assert {name: row["response"]["status_code"] for name, row in failures.items()} == {"lost": 404, "refused": 403}
    asked = lines[3]["body"]["messages"][0]["content"]
    response = answers["q3"]["response"]
    assert (response["status_code"], answers["q3"]["error"]) == (200, None)
    assert asked in response["body"]["choices"][0]["message"]["content"]
    usage = [row["response"]["body"]["usage"]["total_tokens"] for row in answers.values()]
    assert done.usage is not None
    assert done.usage.total_tokens == sum(usage)
    assert client.files.retrieve(str(done.output_file_id)).purpose == "batch_output"
    assert client.batches.list(limit=1).data[0] == done


def test_a_batch_takes_every_endpoint_and_the_cache(client: openai.OpenAI, ground: Place) -> None:
    """Embeddings and text work too, and what is in the cache costs no call."""
    vector = line("v", url="/v1/embeddings")
    vector["body"] = {"model": "text-embedding-mock", "input": new()}
    assert wait(client, start(client, [vector], endpoint="/v1/embeddings").id).output_file_id
    text = line("t", url="/v1/completions")
    text["body"] = {"model": "gpt-mock", "prompt": new(), "temperature": 0, "max_tokens": 3}
    assert wait(client, start(client, [text], endpoint="/v1/completions").id).output_file_id
    once = line("once")
    client.post("/chat/completions", body=once["body"], cast_to=object)
    before = ground.calls()
    assert wait(client, start(client, [once]).id).status == "completed"
    assert ground.calls() == before


def test_what_is_wrong_in_a_file_is_told_by_line_before_anything_is_asked(client: openai.OpenAI, ground: Place) -> None:
    lines: list[Any] = [
        line("a"), line("a"), line("b", method="GET"), line("c", url="/v1/embeddings"), {"custom_id": "d"},
        line("e", stream=True), line("f", model=None), [1],
    ]  # fmt: skip
    done = wait(client, start(client, lines).id)
    assert (done.status, done.output_file_id) == ("failed", None)
    assert done.errors is not None
    told = {(each.line, each.code) for each in done.errors.data or ()}
    assert {
        (2, "duplicate_custom_id"), (3, "invalid_method"), (4, "invalid_url"), (5, "invalid_method"),
        (6, "invalid_request"), (7, "missing_required_parameter"), (8, "invalid_json_line"),
    } <= told  # fmt: skip
    assert ground.calls() == 0
    assert wait(client, start(client, []).id).status == "failed"


def test_a_byte_order_mark_is_no_part_of_the_first_line(client: openai.OpenAI) -> None:
    """Windows' editors and PowerShell write one before UTF-8; the batch runs as without it."""
    given = client.files.create(file=("in.jsonl", b"\xef\xbb\xbf" + jsonl([line("a"), line("b")])), purpose="batch")
    made = client.batches.create(input_file_id=given.id, endpoint=CHAT, completion_window="24h")
    done = wait(client, made.id)
    assert done.status == "completed", done.errors
    assert set(rows(client, done.output_file_id)) == {"a", "b"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input_file_id": "file-" + "0" * 32}, "file_id"),
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"wibble": 1}, "wibble"),
    ],
)
def test_a_batch_is_refused_by_name(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    given = client.files.create(file=("in.jsonl", b"x"), purpose="batch")
    body = {"input_file_id": given.id, "endpoint": CHAT, "completion_window": "24h"} | fields
    with pytest.raises(openai.APIStatusError) as refused:
        client.post("/batches", body=body, cast_to=object)
    assert refused.value.param == param


def test_a_batch_is_cancelled_and_keeps_what_it_has(client: openai.OpenAI, ground: Place) -> None:
    """Lines that are done or in flight are kept, no further one is asked."""
    with ground.gate():
        given = start(client, partly_held(6, 194))
        ground.in_flight()
        assert client.batches.cancel(given.id).status == "cancelling"
    done = wait(client, given.id)
    assert done.status == "cancelled"
    assert done.cancelled_at
    assert done.request_counts
    kept = rows(client, done.output_file_id)
    assert set(kept) == {f"q{n}" for n in range(6 + AT_ONCE)}
    assert done.request_counts.completed == len(kept)
    assert ground.calls() == AT_ONCE
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(start_and_end(client).id)


def start_and_end(client: openai.OpenAI) -> Batch:
    return wait(client, start(client, [line("a")]).id)


def test_interactive_requests_go_first(client: openai.OpenAI, ground: Place) -> None:
    """While somebody is served, a batch goes on a line at a time, rarely: fewer lines than events of a slow stream.
    When nobody is, it goes on at once."""
    asked: Any = line("")["body"] | {"model": "gpt-mock-endless"}
    with client.chat.completions.create(**asked, stream=True) as stream:
        next(stream)
        given = start(client, [line(f"q{n}") for n in range(200)])
        for events, _ in enumerate(stream, 1):  # one in 100 ms or fewer
            begun = ground.calls() - 1
            assert begun <= events
            if begun >= 2:
                break
    done = wait(client, given.id)
    assert (done.status, len(rows(client, done.output_file_id))) == ("completed", 200)


# ---- crashes, other workers, other owners


def test_a_killed_batch_goes_on_and_asks_no_line_twice(ground: Place, shared: Process) -> None:
    """kill -9 in the middle: another process takes the batch up, and every line is recorded once."""
    lines = partly_held(20, 40)
    files = ground.folder / "files"
    with ground.proxy() as first, sdk(first.url) as client, stopped(shared):
        with ground.gate():
            given = start(client, lines)
            ground.in_flight()
            os.kill(first.popen.pid, signal.SIGKILL)
            first.popen.wait()
        journal = next(files.glob(f"*/{given.id}.journal"))
        with journal.open("ab") as torn:
            torn.write(b'{"line": 59, "ok": tr')  # as a crash leaves it
        ground.lose_lease(given.id)
    with sdk(shared.url) as client:
        done = wait(client, given.id)
        assert done.status == "completed"
        assert set(rows(client, done.output_file_id)) == {each["custom_id"] for each in lines}
        assert done.request_counts is not None
        assert (done.request_counts.completed, done.request_counts.failed) == (60, 0)
    assert ground.calls(ground.model) == 20
    assert ground.calls() == 40 + AT_ONCE  # what was under way at the kill
    eventually(lambda: ground.left(given.id) == [f"{given.id}.json"], what="the batch's files are removed")
    assert not list(files.rglob(".draft*"))


def test_two_processes_share_the_work_and_ask_nothing_twice(ground: Place, shared: Process) -> None:
    with ground.proxy() as other, sdk(shared.url) as here, sdk(other.url) as there:
        given = [start(here if n % 2 else there, [line(f"q{n}") for n in range(30)]) for n in range(4)]
        for each in given:
            assert wait(there, each.id).status == "completed"
            assert len(rows(here, there.batches.retrieve(each.id).output_file_id)) == 30
    assert ground.calls() == 120


def test_a_worker_that_was_stopped_records_nothing_any_more(
    ground: Place, shared: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP for longer than the lease: another worker ends the batch; what the first one wakes up with is void."""
    changed(monkeypatch, "batches.worker.LEASE_SECONDS = 1.0")
    with ground.proxy() as one, sdk(one.url) as mine, sdk(shared.url) as client:
        with stopped(shared), ground.gate():
            given = start(mine, partly_held(8, 32))
            ground.in_flight()
            one.popen.send_signal(signal.SIGSTOP)
        with stopped(one):
            done = wait(client, given.id)
            assert (done.status, len(rows(client, done.output_file_id))) == ("completed", 40)
        # The answers to its lines have lain in its sockets: it reads them before those to a request that comes now.
        for _ in range(3):
            mine.post("/chat/completions", body=line("")["body"], cast_to=object)
        assert client.batches.retrieve(given.id) == done
        assert len(rows(client, done.output_file_id)) == 40
        eventually(lambda: ground.left(given.id) == [f"{given.id}.json"], what="the batch's files are removed")


def test_a_batch_that_is_too_late_expires(ground: Place, shared: Process) -> None:
    """What was not asked within the window stands in the errors file, by OpenAI's code. A proxy with
    PROXY_BATCH_CONCURRENCY=0 takes batches and leaves them to others."""
    with stopped(shared), ground.proxy(batch_concurrency="0") as idle, sdk(idle.url) as client:
        given = start(client, [line("a"), line("b")])
        state = next((ground.folder / "files").glob(f"*/{given.id}.json"))
        kept = json.loads(state.read_text())
        kept["batch"]["expires_at"] = 1
        state.write_text(json.dumps(kept))
    with sdk(shared.url) as client:
        done = wait(client, given.id)
        assert done.status == "expired"
        assert {row["error"]["code"] for row in rows(client, done.error_file_id).values()} == {"batch_expired"}
    assert ground.calls() == 0


def test_batches_are_their_owners_alone(ground: Place, keyed: Process, admin: httpx2.Client) -> None:
    """Another owner's file and batch are a 404; a line has its owner's permissions, and costs the full price."""
    mine, other = (
        admin.post("/admin/keys", json={"owner": owner, "models": ["gpt-4o"]}).json()["key"] for owner in ("ann", "bob")
    )
    with sdk(keyed.url, mine) as ann, sdk(keyed.url, other) as bob:
        asked = [line("mine", model="gpt-4o"), line("not mine", model="gpt-mock")]
        given = start(ann, asked)
        file_id = given.input_file_id
        for reach in (
            lambda: bob.batches.retrieve(given.id),
            lambda: bob.batches.cancel(given.id),
            lambda: bob.files.retrieve(file_id),
            lambda: bob.files.content(file_id),
            lambda: bob.files.delete(file_id),
            lambda: bob.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h"),
        ):
            with pytest.raises(openai.NotFoundError):
                reach()
        assert not bob.batches.list().data
        assert not bob.files.list().data
        done = wait(ann, given.id)
        assert set(rows(ann, done.output_file_id)) == {"mine"}
        refused = rows(ann, done.error_file_id)["not mine"]["response"]
        assert (refused["status_code"], refused["body"]["error"]["code"]) == (403, "model_not_allowed")

        def cost(ask: Any) -> float:
            before = spent(admin)
            ask()
            return spent(admin) - before

        assert spent(admin) > 0
        whole = cost(lambda: ann.chat.completions.create(**line("", model="gpt-4o")["body"]))
        batched = cost(lambda: wait(ann, start(ann, [line("h", model="gpt-4o")]).id))
        assert batched == pytest.approx(whole, rel=0.01)


def spent(admin: httpx2.Client) -> float:
    """Dollars, by ann. The proxy books what it has before it answers."""
    told = admin.get("/admin/usage", params={"owner": "ann"}).json()
    return float(told["total"]["cost_usd"])


def test_a_revoked_keys_batch_ends(ground: Place, keyed: Process, admin: httpx2.Client) -> None:
    """It says why, and keeps what it has."""
    ground.control(delay=0.2)
    first, second = (admin.post("/admin/keys", json={"owner": "cid"}).json() for _ in range(2))
    with sdk(keyed.url, first["key"]) as client:
        given = start(client, [line(f"q{n}") for n in range(200)])
        eventually(lambda: ground.calls() >= 5, what="five lines")
    assert admin.delete(f"/admin/keys/{first['id']}").is_success
    before = ground.calls()
    with sdk(keyed.url, second["key"]) as client:  # the same owner's other key
        done = wait(client, given.id)
        assert done.status == "failed"
        assert done.errors
        assert [each.code for each in done.errors.data or ()] == ["invalid_api_key"]
        assert rows(client, done.output_file_id)
    # Each line takes 0.2 s or longer, and the key is looked up again before a line that begins 2 s after the last time.
    assert ground.calls() - before <= AT_ONCE * (worker.IDENTITY_SECONDS / 0.2 + 2)


def test_a_line_waits_for_its_keys_limit(ground: Place, keyed: Process, admin: httpx2.Client) -> None:
    """Requests a minute are the batch's too: what is over them is asked later, not refused."""
    made = admin.post("/admin/keys", json={"owner": "dan", "rpm": 30}).json()
    with sdk(keyed.url, made["key"]) as client, contextlib.closing(redis.Redis(port=ground.redis.port)) as db:
        given = client.files.create(file=("in.jsonl", jsonl([line("q")])), purpose="batch")
        # As if the key had asked so often that its next request may come in 3 to 4 seconds.
        db.hset(f"{PREFIX}{{{made['id']}}}", "r", (db.execute_command("TIME")[0] + 60 + 2) * 1_000_000)
        asked = client.batches.create(input_file_id=given.id, endpoint=CHAT, completion_window="24h")
        done = wait(client, asked.id)
        assert done.request_counts
        assert (done.request_counts.completed, done.request_counts.failed) == (1, 0)
    assert ground.calls() == 1
    assert 'limits_refused_total{reason="rpm"} ' in admin.get("/metrics").text


def test_while_draining_nothing_new_is_begun(ground: Place, shared: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch is taken and no line is started; another process goes on, and no answer is lost."""
    changed(monkeypatch, "batches.worker.YIELD_SECONDS = 0.05")  # else interactive requests hold the lines up anyway
    with ground.proxy() as first, sdk(first.url) as client, stopped(shared):
        ground.control(held=True)
        asked: Any = line("")["body"] | {"model": "gpt-mock-slow"}
        with client.chat.completions.create(**asked, stream=True) as stream:
            next(stream)
            given = start(client, [line(f"q{n}") for n in range(60)])
            eventually(lambda: ground.calls() >= 3, what="two lines")
            first.popen.terminate()
            eventually(lambda: draining(first.url), what="the drain")
            before = ground.calls()
            with pytest.raises(openai.InternalServerError) as refused:
                client.batches.create(input_file_id=given.input_file_id, endpoint=CHAT, completion_window="24h")
            assert refused.value.code == "draining"
            ground.control(held=False)
            assert list(stream)  # twenty lines' time
        assert first.popen.wait(60) == 0
        assert ground.calls() <= before + 1
    with sdk(shared.url) as client:
        done = wait(client, given.id)
        assert (done.status, len(rows(client, done.output_file_id))) == ("completed", 60)


def draining(url: str) -> bool:
    return httpx2.get(f"{url}/ready").json().get("status") == "draining"


def test_a_disk_that_takes_nothing_is_told(client: openai.OpenAI, ground: Place) -> None:
    """A clear error for files and batches, and everything else goes on."""
    files = ground.folder / "files"
    kept = files.rename(ground.folder / "kept")
    files.write_text("no folder")
    try:
        with pytest.raises(openai.APIStatusError) as full:
            client.files.create(file=("a", b"x"), purpose="batch")
        assert (full.value.status_code, full.value.code) == (507, "file_storage_full")
        assert not client.files.list().data
        assert client.post("/chat/completions", body=line("")["body"], cast_to=object)
    finally:
        files.unlink()
        kept.rename(files)
