"""`python -m lab COMMAND`: the lab's commands, run by the Python of `.venv`. The Makefile has a target for each."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from lab.terminal import MEANING, Exit, LabError, complain, end_on_signals, given_arguments, say

try:
    import psutil

    from lab import checks, doctor
    from lab.install import one_at_a_time
    from lab.logs import follow
    from lab.services import Service, environment, models_folder, probe, services, start_timeout
    from lab.supervise import GIVEN_UP, Lab, NotRunningError
except ImportError as error:
    complain(f"lab: .venv is broken ({error}); remove it with make clean, then repeat the command")
    sys.exit(Exit.ENVIRONMENT)

ROOT = Path(__file__).resolve().parent.parent

LOOK_SECONDS = 0.5  # between checks of the services while their logs are followed

Choose = Callable[[Mapping[str, str], Path], list[Service]]  # environment and state folder -> services to run


def main(argv: Sequence[str], root: Path = ROOT, choose: Choose = services) -> int:
    end_on_signals()
    lab = Lab(root)
    commands: dict[str, tuple[str, Callable[[argparse.Namespace], int]]] = {
        "lab": ("start in the foreground; Ctrl-C stops all services", lambda _: foreground(lab, choose)),
        "start": ("start in the background; returns when all services are ready", lambda _: background(lab, choose)),
        "stop": ("stop all services", lambda _: stop(lab)),
        "status": ("state, address and memory of each service", lambda _: status(lab)),
        "logs": ("follow the logs of all services or of one", lambda options: logs(lab, options.service)),
        "models": ("list the models, or add some (ADD=<name>)", lambda options: models(lab, options.add)),
        "keys": ("manage virtual keys of the running lab", lambda options: operate(lab, "keys", options.arguments)),
        "usage": ("tokens and cost by day, owner, model", lambda options: operate(lab, "usage", options.arguments)),
        "doctor": ("find problems and remedies", lambda options: examine(lab, choose, as_json=options.json)),
        "load": (
            "put load on the running lab, or on LOAD_HOST",
            lambda options: load(lab, options.load, options.arguments),
        ),
        "test": ("run the tests", lambda options: checks.test(root, options.lane, options.arguments)),
        "check": ("check lint, format, types and terms", lambda _: checks.check(root)),
        "constraints": ("write constraints.txt from .venv", lambda _: checks.constraints(root)),
    }
    parser = argparse.ArgumentParser(
        prog="python -m lab",
        description=__doc__,
        epilog="exit codes:\n" + "\n".join(f"  {code:3} {meaning}" for code, meaning in MEANING.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (purpose, _) in commands.items():
        sub = subparsers.add_parser(
            name, help=purpose, description=purpose, epilog=parser.epilog, formatter_class=parser.formatter_class
        )
        if name == "logs":
            sub.add_argument("service", nargs="?", default=os.environ.get("SERVICE") or None)
        if name == "models":
            sub.add_argument("add", nargs="?", default=os.environ.get("ADD") or None)
        if name == "doctor":
            sub.add_argument("--json", action="store_true", help="findings as a JSON list")
        if name in {"keys", "usage"}:
            sub.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of python -m lab_proxy")
        if name == "load":
            sub.add_argument("load", help="command of python -m lab_load: a workload, web, knee, …")
            sub.add_argument("arguments", nargs="*", help="arguments of that command")
        if name == "test":
            lanes = "; ".join(f"{lane}: {what}" for lane, what in checks.LANES.items())
            sub.add_argument("--lane", choices=checks.LANES, default="quick", help=lanes)
            sub.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of pytest")
    options = parser.parse_args(argv)
    try:
        return commands[options.command][1](options)
    except LabError as trouble:
        complain(f"lab: {trouble}")
        return trouble.code
    except KeyboardInterrupt:
        return Exit.INTERRUPTED


def foreground(lab: Lab, choose: Choose) -> int:
    """Start, follow the logs, and stop all on Ctrl-C."""
    try:
        with _nothing_left(lab):
            if not _start(lab, choose):
                return Exit.FINE
            say("lab: ready; Ctrl-C stops all services. Their logs follow:")
            _follow(lab)
    except KeyboardInterrupt:
        return Exit.FINE if lab.was_ready else Exit.INTERRUPTED
    return Exit.FINE


def background(lab: Lab, choose: Choose) -> int:
    """Start and return when all services are ready. If one fails to start, all are stopped."""
    with _nothing_left(lab):
        if _start(lab, choose):
            say("lab: ready in the background; next: make status, make logs, make stop")
    return Exit.FINE


def _start(lab: Lab, choose: Choose) -> bool:
    """Start and wait until all services are ready. False if the lab runs already; its dead services are started again.
    Raises LabError."""
    with one_at_a_time(lab.root):
        if lab.running():
            say("lab: already running; changed settings take effect after make stop and make start")
            _repair(lab)
            _print_urls(lab.started())
            return False
        if ended := lab.sweep():  # before the ports are checked: these processes hold them
            say(f"lab: ended {len(ended)} processes of an earlier start whose supervisor was killed")
        chosen, timeout = choose(os.environ, lab.state), start_timeout(os.environ)
        findings = doctor.examine(chosen, doctor.read_machine(lab.root))
        for finding in findings:
            if finding.stops:
                complain(finding.line())
        if any(finding.stops for finding in findings) and os.environ.get("LAB_FORCE") != "1":
            raise LabError(findings[0].exit, "not started; each line above names a problem and its remedy")
        say(f"lab: starting {', '.join(service.name for service in chosen)}")
        given = environment(os.environ, chosen, lab.root / "secrets") | models_folder(os.environ, lab.state)
        lab.start(chosen, given | {"UI_FINDINGS_FILE": str(lab.findings)})
        doctor.write_findings(lab.findings, findings)
        lab.wait(chosen, timeout)
    _print_urls(chosen)
    if given.get("PROXY_ADMIN_KEY") or given.get("PROXY_ADMIN_KEY_FILE"):
        say('    every caller needs a virtual key: make keys ARGS="create --owner NAME"')
    return True


def _repair(lab: Lab) -> None:
    """Start the services that supervisord no longer restarts, and wait until all are ready. Raises LabError."""
    try:
        if dead := lab.given_up():
            say(f"lab: starting {', '.join(dead)} again")
            lab.start_again(dead)
    except NotRunningError:
        raise LabError(Exit.SERVICE, "another command stopped the lab at the same time") from None
    lab.wait(lab.started(), start_timeout(os.environ))


def _print_urls(chosen: Sequence[Service]) -> None:
    for service in reversed(chosen):
        say(f"    {service.name:6} {service.url}")


@contextlib.contextmanager
def _nothing_left(lab: Lab) -> Iterator[None]:
    """Stop everything this command started if the block raises, also by Ctrl-C."""
    try:
        yield
    except BaseException as error:
        if lab.mine:
            interrupted = isinstance(error, KeyboardInterrupt)
            say(f"{chr(10) if interrupted else ''}lab: stopping{' (Ctrl-C again kills)' if interrupted else ''}")
            try:
                lab.stop()
            except KeyboardInterrupt:
                lab.kill()
            say("lab: stopped; no process is left running")
        raise


def _follow(lab: Lab) -> None:
    """Print the services' log lines and their restarts, until the lab is stopped."""
    pids: dict[str, int] = {}
    dead: set[str] = set()
    looked = time.monotonic()
    with follow(lab.logs, [service.name for service in lab.started()]) as lines:
        for line in lines:
            if line:
                say(line)
            if time.monotonic() - looked < LOOK_SECONDS:
                continue
            looked = time.monotonic()
            try:
                states = lab.states()
            except NotRunningError:
                say("lab: stopped by another command")
                return
            now = {state.name: state.pid for state in states.values()}
            for name, pid in now.items():
                if pid != pids.get(name, pid):
                    say(f"lab: {name} was restarted (pid {pid})" if pid else f"lab: {name} died and is being restarted")
            given_up = {state.name for state in states.values() if state.state in GIVEN_UP}
            for name in sorted(given_up - dead):
                say(f"lab: {name} died too often and is no longer restarted; make start in another terminal starts it")
            pids, dead = now, given_up


def stop(lab: Lab) -> int:
    if lab.running():
        say("lab: stopping")
    count = lab.stop()
    say(f"lab: stopped, {count} processes ended" if count else "lab: nothing was running")
    return Exit.FINE


def status(lab: Lab) -> int:
    try:
        states = lab.states()
    except NotRunningError:
        say("lab: not running; make start starts it")
        return Exit.FINE
    say(f"{'SERVICE':8} {'STATE':10} {'PID':>7} {'MEMORY':>9} {'UPTIME':>9}  URL")
    for service in lab.started():
        state = states[service.name]
        ready, reply = probe(service)
        word = state.state.lower() if not state.pid else "ready" if ready else reply or "starting"
        up = int(time.time() - state.since) if state.since else 0
        uptime = f"{up // 3600}:{up // 60 % 60:02}:{up % 60:02}"
        megabytes = f"{memory(state.pid) / 2**20:.0f} MiB"
        say(f"{service.name:8} {word:10} {state.pid:>7} {megabytes:>9} {uptime:>9}  {service.url}")
    return Exit.FINE


def logs(lab: Lab, service: str | None) -> int:
    """Print the last lines, then new ones as long as the lab runs."""
    names = [known.name for known in lab.started()]
    if service and service not in names:
        raise LabError(Exit.WRONG_SETTING, f"no service is named {service}; services: {', '.join(names) or 'none yet'}")
    try:
        with follow(lab.logs, [service] if service else names, lines=200 if service else 20) as lines:
            for line in lines:
                if line:
                    say(line)
                elif not lab.running():
                    say("lab: not running; the lines above are the last ones")
                    break
    except KeyboardInterrupt:
        pass
    return Exit.FINE


def operate(lab: Lab, command: str, arguments: Sequence[str]) -> int:
    """Run a command of the proxy with the addresses and key files of the running lab. Returns its exit code."""
    if not lab.running():
        raise LabError(Exit.SERVICE, f"`{command}` needs the lab's redis, but the lab is not running: make start")
    arguments = [*given_arguments(os.environ), *arguments]
    if command == "keys" and not arguments:
        arguments = ["--help"]
    given = environment(os.environ, lab.started(), lab.root / "secrets")
    argv = [sys.executable, "-m", "lab_proxy", command, *arguments]
    return subprocess.run(argv, cwd=lab.root, env=given, check=False).returncode


def models(lab: Lab, added: str | None) -> int:
    """List the model service's models, or add some; a running lab finds new ones by itself. Returns the exit code."""
    argv = [sys.executable, "-m", "lab_model.cli", *(["add", added] if added else ["list"])]
    given = dict(os.environ) | models_folder(os.environ, lab.state)
    return subprocess.run(argv, env=given, check=False).returncode


def load(lab: Lab, command: str, arguments: Sequence[str]) -> int:
    """Replace this process by `lab_load`, so that Ctrl-C reaches it and its exit code is the command's."""
    running = {service.name: service.url for service in lab.started()} if lab.running() else {}
    given = dict(os.environ)
    given["LOAD_HOST"] = (
        given.get("LOAD_HOST") or running.get("proxy") or f"http://127.0.0.1:{given.get('PROXY_PORT') or 8080}"
    )
    # Load on this lab also compares the model's counters.
    if given["LOAD_HOST"] == running.get("proxy") and "model" in running:
        given.setdefault("LOAD_MODEL_URLS", running["model"])
    if command == "faults" and not arguments:
        disturbed = ("redis", "proxy", "model")
        if running:
            states = lab.states()
            arguments = [f"{name}={states[name].pid}" for name in disturbed if name in states]
        else:
            found = {name: container(lab.root, name) for name in disturbed}
            arguments = [f"{name}=container:{id_}" for name, id_ in found.items() if id_]
    argv = [sys.executable, "-m", "lab_load", command, *arguments]
    return os.execve(sys.executable, argv, given)  # noqa: S606


def container(root: Path, service: str) -> str | None:
    """Id of a running container of `make up`, None if there is none or no Docker."""
    try:
        done = subprocess.run(
            ["docker", "compose", "ps", "--quiet", service], cwd=root, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None


def examine(lab: Lab, choose: Choose, *, as_json: bool) -> int:
    running = lab.running()  # then the lab itself holds the ports and the memory
    in_use = running or lab.orphans()
    findings = doctor.examine([] if in_use else choose(os.environ, lab.state), doctor.read_machine(lab.root))
    findings = [finding for finding in findings if not (in_use and finding.exit is Exit.MEMORY)]
    findings = sorted([*doctor.examine_lab(lab), *findings], key=lambda finding: not finding.stops)
    if running:
        doctor.write_findings(lab.findings, findings)
    if as_json:
        say(json.dumps([asdict(finding) | {"class": finding.exit.name.lower()} for finding in findings], indent=1))
    else:
        for finding in findings:
            say(finding.line())
        state = "the lab is running" if running else "the lab can start"
        stopping = sum(finding.stops for finding in findings)
        what = "keep a service from working" if in_use else "keep the lab from starting"
        say(f"lab: problems (✗) that {what}: {stopping}" if stopping else f"lab: {state}")
    return findings[0].exit if findings and findings[0].stops else Exit.FINE


def memory(pid: int) -> int:
    """Bytes of memory of a process and its descendants. On Linux, pages that they share count once."""
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                reported = one.memory_full_info()
                total += int(getattr(reported, "pss", reported.uss))
    return total


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
