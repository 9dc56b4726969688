"""Virtual keys: who may come in, and that a key, its digest or another's usage cannot be had."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import signal
import stat
import subprocess
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from fixtures_keys import ADMIN_KEY, Holder, School, school_on
from fixtures_proxy import CHAT_MODEL, Bench, new, redis_client, state
from lab_proxy import __main__ as program
from lab_proxy.errors import InvalidKey
from lab_proxy.keys import authentication, store
from lab_proxy.settings import Settings, admin_key_weakness
from processes import GENEROUS_SECONDS, eventually, free_port, python, redis_server


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Iterator[School]:
    with school_on(tmp_path_factory.mktemp("school"), allowed_origins="https://lab.example") as started:
        yield started


def code(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


# ---- who may come in


def test_with_an_admin_key_every_caller_needs_a_virtual_key(school: School) -> None:
    """No key, a wrong one, the admin's own: 401 in OpenAI's words. Probes stay open."""
    for headers in ({}, {"authorization": "Bearer any"}, {"authorization": "Bearer sk-lab-" + "x" * 43},
                    {"authorization": f"Bearer {ADMIN_KEY}"}, {"authorization": "Basic c2s6"},
                    {"authorization": "Bearer sk-lab-" + "y" * 5000}):  # fmt: skip
        answer = school.one.chat(headers=headers)
        assert code(answer) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert code(school.one.http.get("/v1/models", headers=headers)) == (401, "invalid_api_key")
        assert code(school.one.http.get("/usage", headers=headers)) == (401, "invalid_api_key")
    for path in ("/health", "/ready"):
        assert school.one.http.get(path).status_code == 200


def test_status_and_metrics_need_a_key_unless_they_are_public(school: School, tmp_path: Path) -> None:
    """A virtual key or the admin key opens them. PROXY_METRICS_PUBLIC opens both to all."""
    for path in ("/status", "/metrics"):
        assert code(school.one.http.get(path)) == (401, "invalid_api_key")
        assert school.key().get(path).status_code == 200
        admin = {"authorization": f"Bearer {ADMIN_KEY}"}
        assert school.one.http.get(path, headers=admin).status_code == 200
    with school.another(tmp_path, metrics_public="true") as other:
        assert [other.http.get(path).status_code for path in ("/status", "/metrics")] == [200, 200]
        assert code(other.http.get("/v1/models")) == (401, "invalid_api_key")


def test_the_openai_sdk_takes_a_virtual_key(school: School) -> None:
    """A virtual key is an api_key; without one the SDK raises its own AuthenticationError."""
    holder = school.key()
    url = f"{school.one.proxy.url}/v1"
    with openai.OpenAI(base_url=url, api_key=holder.key, max_retries=0) as client:
        said = client.chat.completions.create(model="gpt-mock", messages=[{"role": "user", "content": new()}])
        assert said.choices[0].message.content
    with (
        openai.OpenAI(base_url=url, api_key="sk-nothing", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_a_key_works_at_once_in_every_process(school: School) -> None:
    """Made at one proxy, good at the other."""
    holder = school.key()
    assert school.at_two(holder).chat().status_code == 200


def test_t2_a_revocation_reaches_every_process(school: School) -> None:
    """Also where both processes have used the key, and for an answer in the cache. A process that has not seen
    the key refuses it from the first request on."""
    warm, cold, text = school.key(), school.key(), new()
    assert warm.chat(text).status_code == 200
    assert state(school.at_two(warm).chat(text)) == "hit"
    for holder in (cold, warm):
        assert school.admin("DELETE", f"keys/{holder.id}").json()["state"] == "revoked"
    for each in (cold, school.at_two(cold)):
        assert code(each.chat()) == (401, "invalid_api_key")
    for each in (warm, school.at_two(warm)):
        eventually(lambda each=each: each.chat(text).status_code != 200, what="the revocation")
        answer = each.chat(text)
        assert code(answer) == (401, "invalid_api_key")
        assert "revoked" in answer.json()["error"]["message"]


async def at_once(
    bench: Bench, asks: list[tuple[str, str, str, Any]], *, file: tuple[str, bytes] | None = None, form: Any = None
) -> list[httpx2.Response]:
    """The answers to requests (method, path, key, JSON or None), each on a connection of its own. `file`: uploaded with
    each of them, and the fields of its `form`."""
    files = {"files": {"file": file}, "data": form} if file else {}
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=bench.proxy.url, timeout=GENEROUS_SECONDS, limits=limits) as http:
        return await asyncio.gather(
            *(http.request(method, path, headers={"authorization": f"Bearer {key}"}, json=body, **files)
              for method, path, key, body in asks)
        )  # fmt: skip


async def test_150_unseen_keys_and_admin_calls_at_once_are_all_served(school: School) -> None:
    """More than redis-py's pool had connections: 150 keys are made, changed and used for the first time at once;
    then each uploads a file and creates a batch of it."""
    made = await at_once(school.one, [("POST", "/admin/keys", ADMIN_KEY, {"owner": new()}) for _ in range(150)])
    assert [each.status_code for each in made] == [201] * 150
    keys = [each.json() for each in made]
    used = await at_once(school.two, [("GET", "/v1/models", each["key"], None) for each in keys])
    assert [each.status_code for each in used] == [200] * 150
    changes = [("PATCH", f"/admin/keys/{each['id']}", ADMIN_KEY, {"rpm": 7}) for each in keys[:75]]
    same = [("PATCH", f"/admin/keys/{keys[75]['id']}", ADMIN_KEY, {"rpm": n + 1}) for n in range(75)]
    changed = await at_once(school.one, changes + same)
    assert [each.status_code for each in changed] == [200] * 150
    line = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "gpt-mock", "messages": []},
    }
    file, form = ("a.jsonl", json.dumps(line).encode()), {"purpose": "batch"}
    uploads = await at_once(
        school.one, [("POST", "/v1/files", each["key"], None) for each in keys], file=file, form=form
    )
    assert [each.status_code for each in uploads] == [200] * 150
    window = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batches = await at_once(school.two, [
        ("POST", "/v1/batches", each["key"], window | {"input_file_id": upload.json()["id"]})
        for each, upload in zip(keys, uploads, strict=True)
    ])  # fmt: skip
    assert [each.status_code for each in batches] == [200] * 150
    listed = {each["id"]: each["rpm"] for each in school.admin("GET", "keys?limit=1000").json()["data"]}
    assert all(listed[each["id"]] == 7 for each in keys[:75])
    assert listed[keys[75]["id"]]


def test_rotation_with_and_without_grace(school: School) -> None:
    """With a grace the old secret goes on beside the new one, without one it ends. The id stays."""
    holder = school.key()
    assert holder.chat().status_code == school.at_two(holder).chat().status_code == 200
    rotated = school.admin("POST", f"keys/{holder.id}/rotate", json={"grace_seconds": 3600}).json()
    assert rotated["id"] == holder.id
    assert rotated["key"] != holder.key
    school.heard()
    for secret in (holder.key, rotated["key"]):
        for at in (school.one, school.two):
            assert Holder(at, secret).chat().status_code == 200
    again = school.admin("POST", f"keys/{holder.id}/rotate").json()
    school.heard()
    for at in (school.one, school.two):
        for secret in (holder.key, rotated["key"]):
            assert code(Holder(at, secret).chat()) == (401, "invalid_api_key")
        assert Holder(at, again["key"]).chat().status_code == 200


@pytest.mark.parametrize(("end", "message"), [("of the key", "expired"), ("of the grace", "rotated")])
async def test_a_key_that_ends_is_refused_also_when_it_was_good_before(
    school: School, monkeypatch: pytest.MonkeyPatch, end: str, message: str
) -> None:
    """The end of its time, or of its grace after a rotation, needs no message from redis, only the process's clock."""
    async with redis_client(school.redis) as client:
        ring = store.KeyStore(client)
        process = authentication.Authenticator(client, timeout=60)
        await process.start()
        ((key, secret),) = await ring.create(
            [store.key_spec({"owner": new()} | ({"expires": "1d"} if "key" in end else {}))]
        )
        if end == "of the grace":
            await ring.rotate(key.id, 86_400)
        headers = {"authorization": f"Bearer {secret}"}
        for _ in range(2):
            assert (await process.authenticate(headers)).key_id == key.id
        clock = types.SimpleNamespace(time=lambda: time.time() + 86_401, monotonic=time.monotonic)
        monkeypatch.setattr(authentication, "time", clock)
        with pytest.raises(InvalidKey, match=message):
            await process.authenticate(headers)
        await process.stop()


def test_an_expired_key_is_refused(school: School) -> None:
    answer = school.key(expires="2020-01-01").chat()
    assert code(answer) == (401, "invalid_api_key")
    assert "expired" in answer.json()["error"]["message"]


def test_t2_a_model_that_is_not_allowed_is_refused_also_where_the_answer_is_cached(school: School) -> None:
    """403 by name; patterns and aliases count; /v1/models lists what the key is good for."""
    owner, text = new(), new()
    assert school.key(owner).chat(text).status_code == 200
    holder = school.key(owner, models=["smollm2-*", "gpt-other"])
    answer = holder.chat(text)
    assert code(answer) == (403, "model_not_allowed")
    assert holder.chat(text, model=CHAT_MODEL).status_code == 200
    assert [each["id"] for each in holder.get("/v1/models").json()["data"]] == [CHAT_MODEL]
    assert holder.get("/v1/models/all-minilm-l6-v2").status_code in {403, 404}


# ---- tenants


def test_t1_a_tenant_is_the_keys_owner_unless_the_operator_names_a_namespace(school: School) -> None:
    """Two keys of one owner share answers, two owners do not, one namespace does; no header makes a tenant."""
    text, owner = new(), new()
    first = school.key(owner)
    assert state(first.chat(text)) == "miss stored"
    assert state(school.key(owner).chat(text)) == "hit"
    forged = {"x-tenant": owner, "x-lab-tenant": owner, "x-api-key": first.key, "openai-organization": owner}
    assert state(school.key().chat(text, headers=forged, user=owner)) == "miss stored"
    # A namespace of an owner's name is not that owner.
    assert state(school.key(namespace=owner).chat(text)) == "miss stored"
    assert state(school.key(namespace=owner).chat(text)) == "hit"


def test_an_owner_cannot_have_a_name_that_is_another_tenant(school: School) -> None:
    """No `:` and no control character in a name, no `local`, one spelling for what looks the same."""
    for owner in ("shared:kim", "local", "", " ", "a\nb", "x" * 65, "=1+1"):
        answer = school.admin("POST", "keys", json={"owner": owner})
        assert answer.status_code == 400, owner
        assert answer.json()["error"]["param"] == "owner"
    made = school.admin("POST", "keys", json={"owner": " 김민준 "}).json()
    assert made["owner"] == "김민준"


# ---- the operator's pages


def test_the_operators_pages_want_the_admin_key_and_no_web_page(school: School) -> None:
    """A student's key, none, a browser: refused; CORS headers are never given, even for an allowed origin."""
    student = school.key()
    paths = [("GET", "/admin/keys"), ("POST", "/admin/keys"), ("GET", "/admin/usage"),
             ("DELETE", f"/admin/keys/{student.id}"), ("POST", f"/admin/keys/{student.id}/rotate"),
             ("PATCH", f"/admin/keys/{student.id}"), ("GET", f"/admin/keys/{student.id}"),
             ("POST", "/admin/models/load"), ("POST", "/admin/models/add")]  # fmt: skip
    for method, path in paths:
        for headers in ({}, student.headers, {"authorization": f"Bearer {ADMIN_KEY}x"}):
            assert code(school.one.http.request(method, path, headers=headers)) == (401, "invalid_api_key")
        headers = {"authorization": f"Bearer {ADMIN_KEY}", "origin": "https://lab.example"}
        answer = school.one.http.request(method, path, headers=headers)
        assert code(answer) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in answer.headers
    flight = school.one.http.request("OPTIONS", "/admin/keys", headers={"origin": "https://lab.example"})
    assert flight.status_code >= 400
    assert "access-control-allow-origin" not in flight.headers
    assert student.chat().status_code == 200


def test_keys_are_created_listed_changed_and_shown_once(school: School) -> None:
    """The secret is in the answer to its making and nowhere else; a field that is not known is refused by name."""
    terms = {"owner": new(), "name": "laptop", "models": ["gpt-*"], "rpm": 60, "tpm": 1000, "concurrency": 4,
             "budget_per_day_usd": "0.50", "budget_total_usd": 3, "expires": "2099-12-31",
             "namespace": "class-1"}  # fmt: skip
    made = school.admin("POST", "keys", json=terms)
    assert made.headers["cache-control"] == "no-store"
    said = made.json()
    assert said["expires"] == "2099-12-31T23:59:59Z"
    listed = school.admin("GET", f"keys?owner={terms['owner']}").json()["data"]
    assert [each["id"] for each in listed] == [said["id"]]
    assert "key" not in listed[0]
    changed = school.admin("PATCH", f"keys/{said['id']}", json={"rpm": None, "tpm": 5}).json()
    assert (changed["rpm"], changed["tpm"], changed["concurrency"]) == (None, 5, 4)
    everything = school.admin("GET", "keys").text + school.admin("GET", f"keys/{said['id']}").text
    digest = store.digest_of(said["key"]).hex()
    assert said["key"] not in everything
    assert digest[:12] not in everything
    wrong_values: dict[str, list[Any]] = {
        "rpm": [0, True],
        "budgets": [1],
        "budget_total_usd": ["0.0000001", -1, "1.2.3", 1e-7, "9" * 40, ".", []],
        "expires": ["soon", "2026-13-45", 1e300],
        "models": [[1], ["gpt-*"] * 201],
    }
    for wrong, field in [({field: value}, field) for field, values in wrong_values.items() for value in values]:
        answer = school.admin("POST", "keys", json={"owner": new()} | wrong)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), answer.text
    assert code(school.admin("DELETE", "keys/key_0123456789abcdef")) == (404, "key_not_found")


def test_keys_are_listed_by_pages(school: School) -> None:
    """A hundred at once unless more are asked for; `after` goes on where a page ended; a wrong field is named."""
    owner = new()
    made = [school.key(owner).id for _ in range(5)]
    seen: list[str] = []
    after = ""
    while True:
        page = school.admin("GET", f"keys?owner={owner}&limit=2{after}").json()
        seen += [each["id"] for each in page["data"]]
        assert page["last_id"] == seen[-1]
        if not page["has_more"]:
            break
        assert len(page["data"]) == 2
        after = f"&after={page['last_id']}"
    assert seen == made
    school.db.hset(store.RECORDS, mapping={f"key_{n:032x}": school.db.hget(store.RECORDS, made[0]) for n in range(150)})
    try:
        everyone = school.admin("GET", "keys").json()
        assert (len(everyone["data"]), everyone["has_more"]) == (100, True)
    finally:
        school.db.hdel(store.RECORDS, *(f"key_{n:032x}" for n in range(150)))
    for wrong in ("limit=0", "limit=1001", "after=key_0"):
        answer = school.admin("GET", f"keys?{wrong}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, wrong.partition("=")[0])


def test_a_key_is_nowhere_but_with_its_holder(school: School) -> None:
    """Not in redis, not in the log, not in metrics, not in an error: nor its digest outside of redis."""
    holder = school.key(rpm=1000)
    holder.chat()
    holder.chat(model="nobody-knows")
    school.one.chat(headers={"authorization": f"Bearer {holder.key}x"})
    digest = store.digest_of(holder.key).hex()
    stored = b""
    for name in school.db.scan_iter("*"):
        kind = school.db.type(name)
        value = {b"hash": school.db.hgetall, b"string": school.db.get, b"set": school.db.smembers}.get(kind, str)(name)
        assert holder.key.encode() not in name
        assert digest[:16].encode() not in name
        stored += repr(value).encode()
    assert holder.key.encode() not in stored
    assert digest.encode() in stored  # the record that the key is checked against
    told = school.one.proxy.log.read_text() + holder.get("/metrics").text + holder.get("/status").text
    assert holder.key not in told
    assert digest[:16] not in told
    assert ADMIN_KEY not in told + stored.decode()


# ---- the command line


def test_a_class_of_keys_from_a_csv_in_one_command(school: School, tmp_path: Path) -> None:
    """One line a key, defaults from the command line, a file that only its owner can read; twice is refused."""
    names = [new()[-12:] for _ in range(30)]
    roster = tmp_path / "class.csv"
    roster.write_text("\ufeffName,rpm\n" + "".join(f"{name},{'7' if name == names[0] else ''}\n" for name in names))
    out = tmp_path / "keys.csv"
    done = school.command("keys", "import", str(roster), "--out", str(out), "--rpm", "20", "--budget-total-usd", "2")
    assert "30 keys created" in done.stderr
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [row["name"] for row in rows] == names
    first, last = Holder(school.one, rows[0]["key"]), Holder(school.two, rows[-1]["key"])
    assert first.usage()["limits"]["rpm"] == 7
    assert last.usage()["limits"]["rpm"] == 20
    again = school.command("keys", "import", str(roster), check=False)
    assert again.returncode == 2
    assert "already" in again.stderr
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("owner,rpm\nfine-one,5\nfine-two,many\n")
    refused = school.command("keys", "import", str(wrong), check=False)
    assert (refused.returncode, "line 3" in refused.stderr, "`rpm`" in refused.stderr) == (2, True, True)
    assert "fine-one" not in school.command("keys", "list", "--json").stdout
    kept = school.command("keys", "import", str(roster), "--again", "--out", str(out), check=False)
    assert kept.returncode == 2  # an existing file is not written over
    assert len(json.loads(school.command("keys", "list", "--json", "--owner", names[5]).stdout)) == 1


def test_the_command_line_and_http_are_one_keyring(school: School) -> None:
    """create, list, change, rotate, revoke from a terminal; the proxies follow."""
    owner = new()
    made = json.loads(school.command("keys", "create", "--owner", owner, "--models", "gpt-*", "--json").stdout)
    holder = Holder(school.one, made["key"], made["id"])
    assert holder.chat().status_code == 200
    table = school.command("keys", "list", "--owner", owner).stdout
    assert made["id"] in table
    assert made["key"] not in table
    assert json.loads(school.command("keys", "change", holder.id, "--rpm", "9", "--json").stdout)["rpm"] == 9
    assert json.loads(school.command("keys", "change", holder.id, "--rpm", "none", "--json").stdout)["rpm"] is None
    rotated = school.command("keys", "rotate", holder.id).stdout.splitlines()[-1]
    school.heard()
    assert holder.chat().status_code == 401
    holder = Holder(school.two, rotated)
    assert holder.chat().status_code == 200
    school.command("keys", "revoke", made["id"])
    school.heard()
    assert holder.chat().status_code == 401
    assert made["id"] not in school.command("keys", "list").stdout
    assert made["id"] in school.command("keys", "list", "--all").stdout
    assert school.command("keys", "revoke", "key_00", check=False).returncode == 2


def test_the_command_line_without_redis_says_so() -> None:
    """Exit code 1, one line, the variable's name."""
    env = os.environ | {"PROXY_REDIS_URL": f"redis://127.0.0.1:{free_port()}/0"}
    done = subprocess.run(python("lab_proxy", "keys", "list"), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "PROXY_REDIS_URL" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# ---- redis is not well


def test_x1_known_keys_go_on_without_redis_and_unknown_ones_get_503(school: School, tmp_path: Path) -> None:
    """Redis paused, then killed: a key that was used before goes on, another gets a 503; all is well when it is back.

    The paused redis never answers: each request waits for it at most its timeout.
    """
    with redis_server(tmp_path) as server, school.another(tmp_path, server, redis_timeout_ms="300") as bench:
        admin = {"authorization": f"Bearer {ADMIN_KEY}"}

        def made() -> Holder:
            said = bench.http.post("/admin/keys", json={"owner": new()}, headers=admin).json()
            return Holder(bench, said["key"], said["id"])

        known, unknown, revoked = made(), made(), made()
        for each in (known, revoked):
            eventually(lambda each=each: each.chat().status_code == 200, what="the first use of a key")
        bench.http.delete(f"/admin/keys/{revoked.id}", headers=admin)
        eventually(lambda: revoked.chat().status_code == 401, what="the revocation")
        os.kill(server.popen.pid, signal.SIGSTOP)
        try:
            assert known.chat().status_code == 200
            for _ in range(5):
                assert code(unknown.chat()) == (503, "keys_unavailable")
                assert known.chat().status_code == 200
            assert code(revoked.chat()) == (503, "keys_unavailable")
            assert code(bench.http.get("/admin/keys", headers=admin)) == (503, "keys_unavailable")
        finally:
            os.kill(server.popen.pid, signal.SIGCONT)
        eventually(lambda: unknown.chat().status_code == 200, what="redis is back")
        assert code(revoked.chat()) == (401, "invalid_api_key")
        server.popen.kill()
        server.popen.wait()
        assert known.chat().status_code == 200
        assert code(Holder(bench, "sk-lab-" + "z" * 43).chat()) == (503, "keys_unavailable")


async def test_changes_of_a_key_at_the_same_time_lose_nothing(school: School) -> None:
    """Twenty changes of one key from as many connections: each is there, and none takes the revocation back."""
    async with redis_client(school.redis) as client:
        ring = store.KeyStore(client)
        ((key, _),) = await ring.create([store.key_spec({"owner": new()})])
        await asyncio.gather(
            *(ring.change(key.id, {"rpm": 5}) for _ in range(7)),
            *(ring.change(key.id, {"tpm": 6}) for _ in range(7)),
            ring.revoke(key.id),
            *(ring.change(key.id, {"concurrency": 7}) for _ in range(6)),
        )
        end = await ring.get(key.id)
    assert (end.rpm, end.tpm, end.concurrency) == (5, 6, 7)
    assert end.revoked


# ---- the admin key


@pytest.mark.parametrize(
    "key",
    ["admin", "sk-1234", "changeme", "password-password-password", "admin-secret-key-for-llm-lab-proxy", "a" * 64,
     "0123456789" * 4, "abcdefghijklmnopqrstuvwxyz0123456789", "abab" * 20, "correct-horse-battery-staple",
     "00000000-0000-0000-0000-000000000000", "tooshort9Xk2"],
)  # fmt: skip
def test_a_weak_admin_key_is_refused(key: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Short, common, repeated, a sequence: exit code 2 and a line with the variable, never with the key."""
    assert admin_key_weakness(key)
    monkeypatch.setenv("PROXY_ADMIN_KEY", key)
    assert program.main(["keys", "list"]) == 2
    _names_the_variable(capsys.readouterr().err, key)


def test_a_weak_admin_key_is_refused_at_the_start() -> None:
    key = "admin-secret-key-for-llm-lab-proxy"
    env = os.environ | {"PROXY_ADMIN_KEY": key}
    done = subprocess.run(python("lab_proxy"), env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    _names_the_variable(done.stderr, key)


def _names_the_variable(said: str, key: str) -> None:
    assert "PROXY_ADMIN_KEY" in said
    assert "openssl rand -hex 32" in said
    assert key not in said.replace("PROXY_ADMIN_KEY", "").replace("admin", "" if key == "admin" else "admin")


def test_good_admin_keys_are_taken() -> None:
    """What `openssl rand -hex 32`, uuid4 and a password manager make."""
    for key in ("9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
                "3f2b8c1e-7d4a-4e9b-9c63-1a5f0e8d2b74", ADMIN_KEY, "vR4!kz#T9qLw2@xNp7$Ym5&B"):  # fmt: skip
        assert admin_key_weakness(key) is None, key


def test_with_keys_it_may_listen_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without keys only by PROXY_ALLOW_ANONYMOUS; a file with an admin key will do, an empty file is no key."""
    for name in [name for name in os.environ if name.startswith("PROXY_")]:
        monkeypatch.delenv(name)
    made: dict[str, Any] = {"host": "0.0.0.0"}
    with pytest.raises(ValueError, match="PROXY_ADMIN_KEY_FILE"):
        Settings(**made)
    assert not Settings(**made, allow_anonymous=True).keys_required
    assert Settings(**made, admin_key=ADMIN_KEY).keys_required
    assert Settings(**made, require_keys=True).keys_required
    file = tmp_path / "admin-key"
    file.write_text(f"{ADMIN_KEY}\n")
    assert Settings(**made, admin_key_file=file).operator_key() == ADMIN_KEY
    file.write_text("\n")
    with pytest.raises(ValueError, match="PROXY_HOST"):
        Settings(**made, admin_key_file=file)
    with pytest.raises(ValueError, match="both set"):
        Settings(admin_key=ADMIN_KEY, admin_key_file=file)
