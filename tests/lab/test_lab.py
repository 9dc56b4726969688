"""The lab's commands with real processes: real sockets, a real supervisord, real signals, small programs."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2
import psutil
import pytest
from fixtures_proxy import CHAT_MODEL, UPSTREAM_KEY, mock
from processes import eventually, free_port

from lab import checks, doctor, install
from lab.__main__ import background
from lab.logs import follow
from lab.services import Service, environment, probe, redis_binary, refuses, services, start_timeout
from lab.supervise import MARK, Lab
from lab.terminal import Exit, LabError

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30

# A service: its first `not_ready` answers and those to /never are 503, the others 200; with a child in a session of its
# own, as Ray has them.
SMALL = """
import http.server, subprocess, sys, time
port, not_ready = int(sys.argv[1]), int(sys.argv[2])
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global not_ready
        not_ready -= 1
        self.send_response(503 if not_ready >= 0 or self.path == "/never" else 200)
        self.end_headers()
        self.wfile.write(b'{"status": "loading"}')
print("listening", flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""
FOR_EVER = 10**9


def small(name: str = "small", *, not_ready: int = 0, code: str = SMALL) -> Service:
    url = f"http://127.0.0.1:{free_port()}"
    argv = (sys.executable, "-c", f"exec({code!r})", url.rsplit(":", 1)[1], str(not_ready))
    return Service(name, argv, url, f"{url}/ready", f"{name.upper()}_PORT", stop_seconds=5)


def belonging(state: Path) -> list[psutil.Process]:
    """Every live process whose environment says that it belongs to the lab of `state`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(state) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path / "lab")
    yield lab
    lab.stop()
    assert not belonging(lab.state), "stop left processes behind"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("shared") / "with a space %s")
    yield lab
    lab.stop()
    assert not belonging(lab.state), "stop left processes behind"


@pytest.fixture
def running(shared: Lab) -> Lab:
    """A lab of two services, started for the first test and for those after one that ended it."""
    if not shared.running():
        shared.start([small("one"), small("two", not_ready=1)], os.environ)
    shared.wait(shared.started(), timeout=60)
    return shared


# -- supervision


def test_a_started_lab_shows_what_runs(running: Lab) -> None:
    eventually(lambda: [state.state for state in running.states().values()] == ["RUNNING", "RUNNING"])
    assert len(belonging(running.state)) == 5, "supervisord, two services, a child of each"
    assert "listening" in running.tail("one")
    assert running.state.stat().st_mode & 0o077 == 0


def test_a_service_that_does_not_get_ready_is_named(running: Lab) -> None:
    one = running.started()[0]
    never = replace(one, ready=f"{one.url}/never")
    with pytest.raises(LabError, match=r"not ready after 0 s: one \(loading\); the end of .*one.log:\nlistening"):
        running.wait([never], timeout=0)


def test_a_killed_service_comes_back(running: Lab) -> None:
    """SIGKILL to a service: supervisord starts it again by itself."""
    eventually(lambda: running.states()["one"].state == "RUNNING")  # past the second in which any death is tried again
    first = running.states()["one"].pid
    os.kill(first, signal.SIGKILL)
    eventually(lambda: running.states()["one"].pid not in {0, first})
    running.wait(running.started(), timeout=60)


def test_what_a_killed_supervisord_left_is_ended_by_the_next_start(
    running: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make start` does not stumble over the ports that they hold; the doctor names them."""
    monkeypatch.setattr(doctor, "read_machine", lambda _root: WELL)
    chosen, left = running.started(), [state.pid for state in running.states().values()]
    psutil.Process(left[0]).parent().kill()  # type: ignore[union-attr]
    eventually(lambda: not running.running())
    assert all(psutil.pid_exists(pid) for pid in left)
    (finding,) = doctor.examine_lab(running)
    assert finding.stops
    assert "processes of this lab run without their supervisor" in finding.what
    assert background(running, lambda _environ, _state: chosen) == Exit.FINE
    assert not set(left) & {process.pid for process in belonging(running.state)}
    assert len(belonging(running.state)) == 5


def test_what_another_version_started_is_stopped(running: Lab) -> None:
    """After an upgrade lab.json may hold fields that a Service no longer has, or lack some."""
    one, rows = running.started()[0], json.loads((running.state / "lab.json").read_text())
    known, newer = rows[0], rows[1] | {"colour": "red"}
    (running.state / "lab.json").write_text(json.dumps([newer, {"name": "two"}, 7, known]))
    assert running.started() == [one]
    (running.state / "lab.json").write_text(json.dumps([newer]))
    assert running.started() == []
    assert running.stop() == 5
    assert not belonging(running.state)


def test_a_forward_proxy_is_not_asked_for_health(running: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A company's `http_proxy` cannot reach this machine's loopback."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr("urllib.request._opener", None)  # urlopen reads the environment once
    assert probe(running.started()[0]) == (True, "ready")


def test_a_wrong_setting_is_not_tried_again(lab: Lab) -> None:
    """Exit code 2 means a wrong setting: told at the first death."""
    service = small(code="import sys; print('SMALL_PORT is no port', flush=True); sys.exit(2)")
    lab.start([service], os.environ)
    with pytest.raises(LabError, match=r"(?s)died by exit status 2; .*SMALL_PORT is no port") as caught:
        lab.wait([service], timeout=60)
    assert caught.value.code is Exit.WRONG_SETTING


def test_a_lab_in_a_deep_folder_stops_without_a_trace(tmp_path: Path) -> None:
    """Unix sockets take 107 bytes of path; a checkout may lie deeper. No process is left, one in its own session
    neither; stop again is fine."""
    lab = Lab(tmp_path / ("deep" * 30))
    assert len(str(lab.socket)) < 104
    assert lab.socket.parent.stat().st_mode & 0o777 == 0o700
    service = small()
    try:
        lab.start([service], os.environ)
        lab.wait([service], timeout=60)
        assert lab.stop() == 3
        assert not belonging(lab.state)
        assert not lab.running()
        assert lab.stop() == 0
    finally:
        lab.stop()
        lab.socket.parent.rmdir()


# -- the commands, as a person runs them

COMMAND = """
import sys
from pathlib import Path
from lab.__main__ import main
from lab.services import Service
root, command = Path(sys.argv[1]), sys.argv[2]
rows = {rows!r}
sys.exit(main(command.split(), root, lambda environ, state: [Service(*row) for row in rows]))
"""


def command(root: Path, name: str, *chosen: Service) -> subprocess.Popen[str]:
    rows = [(s.name, s.argv, s.url, s.ready, s.variable, s.stop_seconds) for s in chosen]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(rows=rows), str(root), name],
        cwd=ROOT,
        env=dict(os.environ) | {"LAB_FORCE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_start_twice_status_and_stop_twice(tmp_path: Path) -> None:
    """Every command is idempotent and ends with one clear line."""
    service = small("proxy")

    def run(name: str, code: int = Exit.FINE) -> str:
        with command(tmp_path, name, service) as process:
            said, _ = process.communicate(timeout=60)
        assert process.returncode == code, said
        return said

    try:
        assert "lab: ready in the background" in run("start")
        assert "already running" in run("start")
        table = run("status")
        assert service.url in table
        assert "MiB" in table
        # The load finds the proxy at whatever port it was started with; this one lists no models.
        assert f"load: {service.url} lists no chat model" in run("load throughput", code=3)
        assert "lab: stopped, 3 processes ended" in run("stop")
        assert "lab: nothing was running" in run("stop")
        assert "not running" in run("status")
        assert "listening" in run("logs")
    finally:
        Lab(tmp_path).stop()
    assert not belonging(tmp_path / ".state")


def test_a_service_that_died_for_good_is_named_and_started_again(tmp_path: Path) -> None:
    """The doctor says so and exits with its class of trouble; `make start` repairs it and leaves the others alone."""
    broken = tmp_path / "broken"
    code = f"import pathlib, sys; pathlib.Path({str(broken)!r}).exists() and sys.exit(7)\n{SMALL}"
    well, weak, lab = small("well"), small("weak", code=code), Lab(tmp_path)

    def run(name: str) -> tuple[int, str]:
        with command(tmp_path, name, well, weak) as process:
            said, _ = process.communicate(timeout=60)
        return process.returncode, said

    try:
        assert run("start")[0] == Exit.FINE
        assert lab.findings.exists()
        assert run("doctor")[0] == Exit.FINE
        eventually(lambda: [state.state for state in lab.states().values()] == ["RUNNING", "RUNNING"])
        before = lab.states()
        broken.touch()
        os.kill(before["weak"].pid, signal.SIGKILL)
        eventually(lambda: lab.states()["weak"].state == "FATAL")
        code_, said = run("doctor")
        assert code_ == Exit.SERVICE
        assert "✗ weak is down and is not restarted, last by exit status 7" in said
        listed = json.loads(lab.findings.read_text())["findings"]  # for the ui
        assert listed[0]["what"] == "weak is down and is not restarted, last by exit status 7"
        broken.unlink()
        code_, said = run("start")
        assert code_ == Exit.FINE, said
        assert "lab: starting weak again" in said
        assert lab.states()["weak"].pid
        assert lab.states()["well"] == before["well"]
        assert run("doctor")[0] == Exit.FINE
    finally:
        Lab(tmp_path).stop()
    assert not belonging(tmp_path / ".state")


CHATTY = SMALL.replace(
    "http.server.ThreadingHTTPServer",
    "import itertools, threading\n"
    "talk = lambda: [(print(n, flush=True), time.sleep(0.05)) for n in itertools.count()]\n"
    "threading.Thread(target=talk, daemon=True).start()\n"
    "http.server.ThreadingHTTPServer",
)


@dataclass
class Begun:
    root: Path
    process: subprocess.Popen[str]

    @property
    def left(self) -> list[psutil.Process]:
        return belonging(self.root / ".state")

    def reads(self, words: str) -> None:
        """What the command prints, up to the line with `words`."""
        assert self.process.stdout is not None
        while words not in (line := self.process.stdout.readline()):
            assert line, f"ended without {words!r}"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Begun]]:
    """Four commands side by side, a test for each: mostly they wait."""
    bad = small("bad", code="import sys; print('no luck', flush=True); sys.exit(3)")
    wanted: dict[str, tuple[str, list[Service]]] = {
        "failing": ("start", [small("good"), bad]),
        "ready": ("lab", [small()]),
        "loading": ("lab", [small(not_ready=FOR_EVER)]),
        "chatty": ("lab", [small(code=CHATTY)]),
    }
    roots = {name: tmp_path_factory.mktemp(name) for name in wanted}
    running = {name: Begun(roots[name], command(roots[name], verb, *of)) for name, (verb, of) in wanted.items()}
    yield running
    for each in running.values():
        with each.process:
            each.process.kill()
        Lab(each.root).stop()


@pytest.mark.parametrize("state", ["ready", "loading"])
def test_ctrl_c_ends_the_foreground_lab_and_all_of_it(begun: dict[str, Begun], state: str) -> None:
    lab = begun[state]
    lab.reads("Ctrl-C stops all" if state == "ready" else "lab: starting")
    eventually(lambda: len(lab.left) >= 3)
    lab.process.send_signal(signal.SIGINT)
    said, _ = lab.process.communicate(timeout=60)
    assert "no process is left running" in said
    assert lab.process.returncode == (Exit.FINE if state == "ready" else Exit.INTERRUPTED)
    assert not lab.left


def test_who_stops_reading_ends_the_lab(begun: dict[str, Begun]) -> None:
    """`make lab | head`, or a terminal that is gone: all stops, as with Ctrl-C."""
    lab = begun["chatty"]
    lab.reads("Ctrl-C stops all")
    assert lab.process.stdout is not None
    lab.process.stdout.close()
    assert lab.process.wait(60) == Exit.FINE
    assert not lab.left


def test_a_failed_start_ends_with_the_last_words_and_leaves_nothing_running(begun: dict[str, Begun]) -> None:
    """A service that keeps dying is tried three times."""
    lab = begun["failing"]
    said, _ = lab.process.communicate(timeout=60)
    assert lab.process.returncode == Exit.SERVICE
    assert re.search(r"(?s)bad died 3 times, last by exit status 3; .*no luck", said), said
    assert not lab.left


# -- the doctor

WELL = doctor.Readings(memory=8 * GIB, disks={"/": 50 * GIB}, python=(3, 11))


def found(exit_: Exit, *chosen: Service, readings: doctor.Readings = WELL) -> doctor.Finding | None:
    return next((finding for finding in doctor.examine(chosen, readings, ()) if finding.exit is exit_), None)


def test_a_taken_port_is_named_with_its_holder_and_a_way_out() -> None:
    service = small()
    with socket.socket() as holder:
        holder.bind(service.address)
        holder.listen()
        finding = found(Exit.PORT, service)
        assert finding is not None
        assert finding.stops
        assert f"port {service.address[1]} is taken" in finding.what
        if sys.platform == "linux":
            assert f"(pid {os.getpid()})" in finding.what
        assert "SMALL_PORT=" in finding.remedy
        assert f"={service.address[1]} " not in finding.remedy
    assert found(Exit.PORT, service) is None


def test_a_host_that_is_none_of_ours_is_told_apart_from_a_taken_port() -> None:
    service = Service("small", (), "http://192.0.2.1:8000", "", "SMALL_PORT")  # RFC 5737: nobody's
    finding = found(Exit.PORT, service)
    assert finding is not None
    assert "192.0.2.1 is not an address of this machine" in finding.what
    assert "SMALL_HOST" in finding.remedy


def test_a_system_without_ipv6_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_ipv6(*_: object) -> None:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr("lab.services.socket.socket", no_ipv6)
    assert refuses("::1", 8000) == errno.EAFNOSUPPORT


@pytest.mark.parametrize(
    ("exit_", "readings"),
    [
        (Exit.MEMORY, doctor.Readings(2 * GIB, WELL.disks, WELL.python)),
        (Exit.DISK, doctor.Readings(WELL.memory, {"/": GIB // 2}, WELL.python)),
        (Exit.PYTHON, doctor.Readings(WELL.memory, WELL.disks, (3, 9))),
    ],
)
def test_a_small_machine_is_told_so(exit_: Exit, readings: doctor.Readings) -> None:
    """One line: what, why it matters, what to do; nothing of it on a machine that is well."""
    finding = found(exit_, readings=readings)
    assert finding is not None
    assert "\n" not in finding.line()
    assert finding.line().count(";") >= 1
    assert found(exit_) is None


def test_folders_of_ray_without_a_process_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of killed runs; not one that a process has in its command line, nor one just made, nor a link."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, held, new = (tmp_path / f"lab-ray-{name}" for name in ("left", "held", "new"))
    for folder in (left, held, new):
        folder.mkdir()
    (tmp_path / "lab-ray-link").symlink_to(left)
    for folder in (left, held):
        os.utime(folder, (0, 0))
    with subprocess.Popen(
        [sys.executable, "-c", "input()", f"--socket={held}/raylet"], stdin=subprocess.PIPE
    ) as holder:
        lines = [finding.line() for finding in doctor.examine((), WELL, ()) if "folders of Ray" in finding.what]
        holder.kill()
    assert len(lines) == 1
    assert lines[0].endswith(f"rm -r {left}")
    left.rmdir()
    held.rmdir()
    assert not any("folders of Ray" in finding.what for finding in doctor.examine((), WELL, ()))


def test_missing_packages_are_named() -> None:
    (finding,) = (f for f in doctor.examine([], WELL, ("sys", "no_such_package")) if f.exit is Exit.ENVIRONMENT)
    assert "no_such_package" in finding.what
    assert "sys" not in finding.what


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_s_memory_limit_counts(tmp_path: Path, version: int) -> None:
    """The tightest control group on the way up decides; page cache that can be dropped is free."""
    groups = tmp_path / "cgroup"
    groups.write_text("5:cpu,memory:/a/b\n" if version == 1 else "0::/a/b\n")
    top = tmp_path / "fs" / ("memory" if version == 1 else "")
    (top / "a" / "b").mkdir(parents=True)
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"), 2: ("memory.max", "memory.current", "")}
    limit, usage, prefix = names[version]

    def group(folder: Path, allowed: object) -> None:
        (folder / limit).write_text(f"{allowed}\n")
        (folder / usage).write_text("400\n")
        (folder / "memory.stat").write_text(f"cache 0\n{prefix}inactive_file 100\n")

    group(top / "a" / "b", "max" if version == 2 else 2**62)
    group(top / "a", 1000)
    assert doctor.free_memory(groups, tmp_path / "fs") == 700
    group(top / "a", 300)
    assert doctor.free_memory(groups, tmp_path / "fs") == 0


def test_no_compiler_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Linux on x86, whose kernels need one; the lab starts without."""
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("PATH", str(tmp_path))
    note = found(Exit.COMPILER)
    assert note
    assert not note.stops
    (tmp_path / "gcc").write_text("")
    (tmp_path / "gcc").chmod(0o755)
    assert found(Exit.COMPILER) is None
    (tmp_path / "gcc").unlink()
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert found(Exit.COMPILER) is None


def test_doctor_speaks_json_and_exits_with_the_class(tmp_path: Path) -> None:
    service = small()
    with socket.socket() as holder:
        holder.bind(service.address)
        holder.listen()
        rows = [(service.name, service.argv, service.url, service.ready, service.variable, 5)]
        code = COMMAND.format(rows=rows).replace("command.split()", "[command, '--json']")
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), "doctor"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    findings = json.loads(done.stdout)
    assert "port" in {finding["class"] for finding in findings}
    assert done.returncode == findings[0]["exit"]


# -- addresses and settings


def test_addresses_follow_the_ports_unless_set(tmp_path: Path) -> None:
    """The user's own environment reaches the services; what he set is never overwritten."""
    environ = {"PROXY_PORT": "9080", "MODEL_PORT": "9000", "LAB_REDIS_PORT": "9379", "MODEL_KV_TOKENS": "512"}
    chosen = services(environ, tmp_path)
    assert [service.name for service in chosen] == ["redis", "model", "proxy", "ui", "load"]
    given = environment(environ, chosen)
    assert given["PROXY_MODEL_URL"] == "http://127.0.0.1:9000"
    assert given["PROXY_REDIS_URL"] == "redis://127.0.0.1:9379/0"
    assert given["UI_PROXY_URL"] == "http://127.0.0.1:9080"
    assert given["LOAD_HOST"] == "http://127.0.0.1:9080"
    assert given["UI_LOAD_URL"] == "http://127.0.0.1:8090"
    assert given["MODEL_KV_TOKENS"] == "512"
    assert environment({"PROXY_MODEL_URL": "http://elsewhere:1"}, chosen)["PROXY_MODEL_URL"] == "http://elsewhere:1"


def test_key_files_reach_the_services_unless_a_variable_says_otherwise(tmp_path: Path) -> None:
    """Key files in secrets/ are taken where they exist; an empty variable turns one off."""
    (tmp_path / "proxy_admin_key").write_text("x")
    (tmp_path / "load_admin_key").write_text("x")
    chosen = services({}, tmp_path)
    given = environment({}, chosen, tmp_path)
    assert given["PROXY_ADMIN_KEY_FILE"] == str(tmp_path / "proxy_admin_key")
    assert given["LOAD_ADMIN_KEY_FILE"] == str(tmp_path / "load_admin_key")
    assert "PROXY_OPENAI_API_KEY_FILE" not in given
    assert environment({"PROXY_ADMIN_KEY_FILE": ""}, chosen, tmp_path)["PROXY_ADMIN_KEY_FILE"] == ""
    assert "PROXY_ADMIN_KEY_FILE" not in environment({"PROXY_ADMIN_KEY": "y"}, chosen, tmp_path)


def test_a_lab_with_a_remote_server_runs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxy, redis and ui: the remote's models are listed and answer, its key goes to it alone, hits come from here."""
    lab = Lab(tmp_path)
    with mock(tmp_path) as remote:
        environ = {"REMOTE": f"{remote.url}/v1/", "PROXY_OPENAI_API_KEY": UPSTREAM_KEY}
        environ |= {name: str(free_port()) for name in ("PROXY_PORT", "UI_PORT", "LAB_REDIS_PORT")}
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(doctor, "read_machine", lambda _root: WELL)
        try:
            assert background(lab, services) == Exit.FINE
            assert list(lab.states()) == ["redis", "proxy", "ui"]
            url = f"http://127.0.0.1:{environ['PROXY_PORT']}"
            assert CHAT_MODEL in {each["id"] for each in httpx2.get(f"{url}/v1/models").json()["data"]}
            body = {"model": CHAT_MODEL, "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
            first, again = (httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60) for _ in range(2))
            assert (first.status_code, again.status_code) == (200, 200), first.text
            assert "hit" in again.headers["cache-status"]
            last = httpx2.get(f"{remote.url}/calls").json()["last"]
            assert last["path"] == "/v1/chat/completions"
            assert last["headers"]["authorization"] == f"Bearer {UPSTREAM_KEY}"
            assert httpx2.post(f"{url}/v1/chat/completions", json=body | {"model": "none"}).status_code == 404
        finally:
            lab.stop()


@pytest.mark.parametrize(
    "wrong", ["api.openai.com/v1", "ftp://a/v1", "https://a.example/v1?key=x", "https://a.example"]
)
def test_a_wrong_remote_is_named(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(LabError, match=f"REMOTE={re.escape(wrong)} ") as caught:
        services({"REMOTE": wrong}, tmp_path)
    assert caught.value.code is Exit.WRONG_SETTING


@pytest.mark.parametrize("wrong", ["eighty", "0", "65536", "-1"])
def test_a_wrong_port_is_named(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(LabError, match=f"UI_PORT={wrong} is not a port") as caught:
        services({"UI_PORT": wrong}, tmp_path)
    assert caught.value.code is Exit.WRONG_SETTING


@pytest.mark.parametrize(("host", "there"), [("::1", "::1"), ("::", "::1"), ("0.0.0.0", "127.0.0.1")])
def test_an_address_of_any_family_is_reached(tmp_path: Path, host: str, there: str) -> None:
    chosen = services({f"{name}_HOST": host for name in ("MODEL", "PROXY", "UI")}, tmp_path)
    assert [service.address for service in chosen[1:4]] == [(there, 8000), (there, 8080), (there, 8501)]
    assert chosen[2].ready == f"http://{f'[{there}]' if ':' in there else there}:8080/ready"


@pytest.mark.parametrize("wrong", ["localhost:8080", "[::1]"])
def test_a_host_with_a_colon_that_is_no_address_is_named(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(LabError, match=rf"PROXY_HOST={re.escape(wrong)} is not an address") as caught:
        services({"PROXY_HOST": wrong}, tmp_path)
    assert caught.value.code is Exit.WRONG_SETTING


def test_waits_follow_the_services_settings(tmp_path: Path) -> None:
    """The lab gives up after the model service does, and kills after its drain; decimals are times too."""
    assert start_timeout({}) == 660
    assert start_timeout({"MODEL_START_TIMEOUT_SECONDS": "1800.5"}) == 1860.5
    environ = {"MODEL_DRAIN_TIMEOUT_SECONDS": "90.5", "PROXY_DRAIN_TIMEOUT_SECONDS": ""}
    assert [service.stop_seconds for service in services(environ, tmp_path)[1:3]] == [106, 45]


def test_a_start_waits_as_long_as_the_model_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setenv("MODEL_START_TIMEOUT_SECONDS", "1800")
    monkeypatch.setenv("LAB_FORCE", "1")
    monkeypatch.setattr(Lab, "start", lambda *_: None)
    monkeypatch.setattr(Lab, "wait", lambda _lab, _chosen, timeout: waits.append(timeout))
    background(Lab(tmp_path), lambda _environ, _state: [])
    assert waits == [1860]


@pytest.mark.parametrize("wrong", ["soon", "-1", "nan", "inf"])
def test_a_wrong_time_is_named(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(LabError, match=f"PROXY_DRAIN_TIMEOUT_SECONDS={wrong} is not a time") as caught:
        services({"PROXY_DRAIN_TIMEOUT_SECONDS": wrong}, tmp_path)
    assert caught.value.code is Exit.WRONG_SETTING
    with pytest.raises(LabError, match=f"MODEL_START_TIMEOUT_SECONDS={wrong} is not a time"):
        start_timeout({"MODEL_START_TIMEOUT_SECONDS": wrong})


def test_redis_keeps_to_loopback_and_to_its_memory(tmp_path: Path) -> None:
    redis = services({}, tmp_path)[0]
    assert redis.argv[0] == redis_binary()
    told = " ".join(redis.argv[1:])
    for option in ("--bind 127.0.0.1", "--maxmemory 256mb", "--maxmemory-policy volatile-lru", "--appendonly yes"):
        assert option in told


def test_redis_makes_way_for_the_system_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution's redis often listens on 6379 already: ours takes a free port, and the proxy learns of it."""
    monkeypatch.setattr("lab.services.refuses", lambda _host, port: 98 if port < 6381 else None)
    chosen = services({}, tmp_path)
    assert chosen[0].address == ("127.0.0.1", 6381)
    assert environment({}, chosen)["PROXY_REDIS_URL"] == "redis://127.0.0.1:6381/0"
    assert services({"LAB_REDIS_PORT": "6379"}, tmp_path)[0].address[1] == 6379, "the user's choice is not moved"


def test_quotes_in_args_that_do_not_close_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARGS", "-k it's")
    with pytest.raises(LabError, match="ARGS=-k it's: No closing quotation") as caught:
        checks.test(tmp_path, "stack", [])
    assert caught.value.code is Exit.WRONG_SETTING


# -- logs


def test_logs_are_followed_over_a_rotation(tmp_path: Path) -> None:
    log = tmp_path / "model.log"
    log.write_text("old\nlast\n")
    (tmp_path / "ui.log").write_text("")
    with follow(tmp_path, ["model", "ui"], lines=1) as lines:
        whole = filter(None, lines)  # without the ticks of silence
        assert next(whole) == "model | last"
        (tmp_path / "ui.log").write_text("hello\n")
        assert next(whole) == "ui    | hello"
        log.rename(tmp_path / "model.log.1")
        log.write_text("after\n")
        assert next(whole) == "model | after"


def test_one_log_is_followed_without_names_and_says_when_it_is_silent(tmp_path: Path) -> None:
    (tmp_path / "model.log").write_text("old\nlast\n")
    with follow(tmp_path, ["model"], lines=1) as lines:
        assert next(lines) == "last"
        assert next(lines) == ""


# -- the environment


def test_an_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    """run.sh needs nothing but sh: an interpreter that is too old is named, with what to do."""
    old = tmp_path / "python3.8"
    old.write_text('#!/bin/sh\ncase "$2" in *print*) echo 3.8 ;; *) exit 1 ;; esac\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["sh", str(ROOT / "lab" / "run.sh"), "start"],
        env=dict(os.environ) | {"PYTHON": str(old)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == Exit.PYTHON
    assert "Python 3.11 to 3.14 is needed" in done.stderr
    assert "uv python install" in done.stderr
    assert "(3.8)" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_checkout_with_windows_line_ends_is_named_in_one_line(tmp_path: Path) -> None:
    """Where git turned line endings into CRLF, sh would fail over its own carriage returns."""
    (tmp_path / "lab").mkdir()
    script = tmp_path / "lab" / "run.sh"
    script.write_bytes((ROOT / "lab" / "run.sh").read_bytes().replace(b"\n", b"\r\n"))
    done = subprocess.run(["sh", str(script), "lab"], capture_output=True, text=True, check=False)
    assert done.returncode == Exit.ENVIRONMENT, done.stderr
    assert "Windows line endings" in done.stderr
    assert done.stderr.count("\n") == 1


def test_python_of_uv_is_found(tmp_path: Path) -> None:
    """uv keeps its Pythons outside PATH: where no Python on PATH fits, uv is asked."""
    (tmp_path / "uv").write_text(f"#!/bin/sh\n[ \"$1 $2\" = 'python find' ] && echo {tmp_path}/from-uv\n")
    (tmp_path / "from-uv").write_text(
        "#!/bin/sh\ncase $* in *lab.install*) echo ran $* ;; *print*) echo 3.12 ;; esac\n"
    )
    for name in ("python3.11", "python3.12", "python3.13", "python3.14", "python3"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
    for tool in ("dirname", "grep"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or "")
    for file in tmp_path.iterdir():
        if not file.is_symlink():
            file.chmod(0o755)
    (tmp_path / "lab").mkdir()
    shutil.copy(ROOT / "lab" / "run.sh", tmp_path / "lab")
    done = subprocess.run(
        ["/bin/sh", str(tmp_path / "lab" / "run.sh"), "start"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "ran -m lab.install start\n", done.stderr


LINUX = install.Platform("Linux", "x86_64", wsl=False, nvidia=False)


@pytest.mark.parametrize(
    ("facts", "root", "words"),
    [
        (replace(LINUX, system="Darwin"), "/Users/kim/lab", "Intel Macs"),
        (replace(LINUX, system="Windows"), "/lab", "WSL 2"),
        (replace(LINUX, wsl=True), "/mnt/c/Users/kim/lab", "Windows drive"),
        (replace(LINUX, wsl=True), "/home/kim/lab", None),
        (replace(LINUX, system="Darwin", machine="arm64"), "/Users/kim/lab", None),
        (LINUX, "/mnt/c/lab", None),
    ],
)
def test_a_system_that_cannot_run_the_lab_is_named_in_one_line(
    facts: install.Platform, root: str, words: str | None
) -> None:
    found = install.obstacle(Path(root), facts)
    assert found is None if words is None else words in (found or "")
    assert "\n" not in (found or "")


def test_torch_is_the_cpu_build_without_a_gpu(tmp_path: Path) -> None:
    """Without an NVIDIA GPU from PyTorch's CPU index while that answers, with one the CUDA build; a setting decides."""
    asked: list[str] = []

    def answers(url: str) -> bool:
        asked.append(url)
        return len(asked) == 1

    cpu = install.torch_build({}, LINUX, answers)
    assert cpu.arguments == ["torch", "--extra-index-url", install.TORCH_CPU_INDEX]
    assert asked == [f"{install.TORCH_CPU_INDEX}/torch/"]
    assert f"TORCH_INDEX_URL ?= {install.TORCH_CPU_INDEX}" in (ROOT / "Makefile").read_text()
    unreachable = install.torch_build({}, LINUX, answers)
    assert unreachable.arguments == ["torch"]
    assert "does not answer" in unreachable.notice
    cuda = install.torch_build({}, replace(LINUX, nvidia=True), answers)
    assert (cuda.arguments, cuda.cuda) == (["torch"], True)
    assert "about 3 GB" in cuda.notice
    chosen = install.torch_build({"TORCH_INDEX_URL": "https://x/whl/cu130"}, replace(LINUX, nvidia=True), answers)
    assert (chosen.arguments, chosen.cuda) == (["torch", "--index-url", "https://x/whl/cu130"], True)
    assert len(asked) == 2


def checkout(folder: Path) -> Path:
    """A checkout without services: what install.py needs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text('[project]\nname = "empty"\nversion = "0"\n')
    (folder / "constraints.txt").write_text("torch==2.13.0\nsetuptools==84.2.1\n")
    return folder


def installing(root: Path, **environ: str) -> subprocess.Popen[str]:
    code = (
        "import pathlib, sys; from lab import install; sys.exit(install.main(['install'], pathlib.Path(sys.argv[1])))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(root)],
        cwd=ROOT,
        env=dict(os.environ) | {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_RETRIES": "0"} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose environment the first install makes, which takes seconds."""
    return checkout(tmp_path_factory.mktemp("checkout"))


def test_without_a_network_the_install_says_what_is_missing(root: Path) -> None:
    with installing(root, PIP_INDEX_URL=f"http://127.0.0.1:{free_port()}/simple") as process:
        said, _ = process.communicate(timeout=60)
    assert process.returncode == Exit.INSTALL, said
    assert "pip could not download a package" in said
    assert "setuptools" in said
    assert not (root / ".venv" / ".stamp").exists()


def test_ctrl_c_while_installing_leaves_no_pip(root: Path) -> None:
    with socket.socket() as silent:  # an index that accepts and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with installing(root, PIP_INDEX_URL=f"http://127.0.0.1:{silent.getsockname()[1]}/simple") as process:
            connection, _ = silent.accept()
            children = psutil.Process(process.pid).children(recursive=True)
            assert children
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=60)
            connection.close()
    assert process.returncode == Exit.INTERRUPTED
    assert "interrupted while installing" in said
    assert not [child for child in children if child.is_running()]


def test_load_installs_neither_torch_nor_services(tmp_path: Path) -> None:
    """Until the lab itself is wanted; from then on its own installation is kept."""
    root = checkout(tmp_path)
    for package in ("load", "services/proxy"):
        checkout(root / package)
    asked = tmp_path / "asked"
    (root / ".venv" / "bin").mkdir(parents=True)
    install.python_of(root).write_text(f'#!/bin/sh\necho "$@" >>{asked}\n')
    install.python_of(root).chmod(0o755)
    (root / ".venv" / "pyvenv.cfg").write_text("version = 3.11.2\n")

    def installed(needed: str) -> str:
        asked.write_text("")
        install.install(root, {}, needed)
        return asked.read_text()

    first = installed("load")
    assert f"-e {root}/load -e {root} " in first
    assert not re.search(r" torch |/services/|smollm2", first)
    assert installed("load") == ""
    assert re.search(rf"(?s) torch .*-e {root}/services/proxy .*smollm2", installed("services"))
    assert installed("load") == ""
    assert f"{root}[test]" in installed("tests")
    assert installed("services") == ""


def test_a_valid_stamp_starts_without_pip_and_a_changed_pin_does_not(tmp_path: Path) -> None:
    """The second start touches no network; the fingerprint covers constraints, pyproject files and Python."""
    root = checkout(tmp_path)
    (root / ".venv" / "bin").mkdir(parents=True)
    python = install.python_of(root)
    python.write_text("#!/bin/sh\nexit 99\n")  # pip, if it ran, would fail
    python.chmod(0o755)
    (root / ".venv" / "pyvenv.cfg").write_text("version = 3.11.2\n")
    stamp = root / ".venv" / ".stamp"
    stamp.write_text(install.fingerprint(root, {}))
    install.install(root, {}, "services")
    with pytest.raises(LabError, match="pip failed"):
        install.install(root, {}, "tests")
    stamp.write_text(install.fingerprint(root, {}))
    (root / "constraints.txt").write_text("torch==2.13.1\n")
    with pytest.raises(LabError, match="pip failed"):
        install.install(root, {}, "services")
