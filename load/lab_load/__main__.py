"""`python -m lab_load COMMAND`: a run of one workload, Locust's web page, or a command that does several runs.

Exit codes: 0 success, 1 requests failed or nothing was measured, 2 a wrong setting, 3 no server to put load on, 4 the
sums of client and servers differ, 5 the figures cannot be trusted, 130 interrupted.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
from pathlib import Path

import psutil
from pydantic import ValidationError

from .commands.runs import RunError
from .generator.target import TargetError
from .settings import Settings, complaint
from .workloads.workload import WORKLOADS

# Command -> purpose. Each is a module of `commands` with `main(settings, arguments) -> exit code`.
COMMANDS = {
    "knee": "open loop at rising rates until goodput falls",
    "table": "effect of the cache: Zipf 0.6, 0.9, 1.2, with and without it",
    "faults": "pause redis, restart the proxy, kill a model replica, under load",
    "compare": "compare two runs, or groups of runs, of one workload: faster, slower or undecided",
    "report": "write report.html and summary.md of a finished run again",
    "calibrate": "check the generator against a mock with known times",
    "api": "HTTP API that starts one bounded run at a time",
}


# Locust's run time starts before its first user, so a scheduled workload gets this many seconds more. It ends with its
# last answer.
SPARE_SECONDS = 5
INTERRUPTED_SECONDS = 60  # for an interrupted run to end


def main(argv: list[str]) -> int:
    names = "\n".join(f"  {name:11} {purpose}" for name, purpose in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m lab_load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"workloads: {', '.join(WORKLOADS)}\n{names}",
    )  # fmt: skip
    parser.add_argument("command", metavar="COMMAND")
    parser.add_argument("arguments", nargs="*", help="arguments of the command")
    options = parser.parse_args(argv)
    known = [*WORKLOADS, "web", "worker", *COMMANDS]
    try:
        if options.command not in known:
            raise ValueError(f"there is no workload or command {options.command}: {', '.join(known)}")
        settings = Settings()
        if options.command in COMMANDS:
            command = importlib.import_module(f".commands.{options.command}", __package__)
            return int(command.main(settings, options.arguments))
        if options.arguments:
            raise ValueError(f"{options.command} takes no arguments; settings are variables, such as LOAD_USERS")
        return run(options.command, settings)
    except ValidationError as error:
        return _stop(complaint(error), 2)
    except ValueError as error:
        return _stop(str(error), 2)
    except TargetError as error:
        return _stop(str(error), 3)
    except RunError as error:
        return _stop(str(error), error.code)
    except KeyboardInterrupt:
        # The same Ctrl-C also ends the run that the command has started; that run still writes its report.
        psutil.wait_procs(psutil.Process().children(), timeout=INTERRUPTED_SECONDS)
        return _stop("interrupted", 130)


def run(what: str, settings: Settings) -> int:
    """Start a run by Locust, its web page, or a worker of either, and end with Locust's exit code. Raises TargetError,
    ValueError."""
    if what == "worker" and settings.master_host is None:
        raise ValueError("LOAD_MASTER_HOST: a worker needs the address of its master")
    # Importing locust patches sockets and time (gevent), so it happens only here, before other code has used them.
    import locust  # noqa: PLC0415
    import locust.main  # noqa: PLC0415

    from .generator.hooks import Hooks  # noqa: PLC0415

    hooks = Hooks(settings)
    if what not in {"web", "worker"}:
        hooks.prepare([what], settings)
    hooks.attach(locust.events)
    gc.freeze()  # the workload and the libraries stay in memory, so collections during the run need not scan them
    gc.set_threshold(100_000)
    sys.argv = ["locust", *locust_arguments(what, settings)]
    locust.main.main()  # type: ignore[no-untyped-call] # ends by sys.exit
    return 0


def locust_arguments(what: str, settings: Settings) -> list[str]:
    """Arguments for Locust's command line. They override its LOCUST_* variables and its configuration files."""
    users_file = str(Path(__file__).parent / "generator" / "users.py")
    if what == "worker":
        master = ["--master-host", str(settings.master_host), "--master-port", str(settings.master_port)]
        return ["--locustfile", users_file, "--worker", *master, "--loglevel", "WARNING"]
    scheduled = what != "web" and (settings.rate is not None or what in {"stampede", "herd"})
    users = settings.generators if scheduled else settings.users
    common = [
        "--locustfile", users_file,
        "--host", settings.host,
        "--users", str(users),
        "--spawn-rate", str(settings.spawn_rate or max(users / 2, 8)),
        "--run-time", str(settings.seconds if not scheduled else settings.longest_schedule + SPARE_SECONDS),
        "--stop-timeout", str(settings.drain_seconds),
        "--exit-code-on-error", "1",
    ]  # fmt: skip
    if settings.workers:
        common += [
            "--master", "--master-bind-host", settings.web_host, "--master-bind-port", str(settings.master_port),
            "--expect-workers", str(settings.workers),
        ]  # fmt: skip
    if what == "web":
        return [*common, "--class-picker", "--web-host", settings.web_host, "--web-port", str(settings.port)]
    several = ["--processes", str(settings.processes)] if settings.processes > 1 else []
    return [*common, *several, "--headless", "--only-summary", "--loglevel", "WARNING", what.capitalize()]


def _stop(why: str, code: int) -> int:
    print(f"load: {why}", file=sys.stderr)  # noqa: T201 there is no log
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
