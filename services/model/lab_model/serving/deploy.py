"""The catalogue on a Ray cluster: `python -m lab_model.serving.deploy [--wait | --print]`, run on one of its nodes.

It gives Serve one application for each entry, and at / the one that reports them. Run again after a change of catalogue
or settings it rolls the change out in place: Serve replaces the replicas of changed applications one after the other.
--wait: until that is done. --print: the Ray Serve config file (ServeDeploySchema), for `serve run` or a RayService.

Knows the settings and Serve's config. Knows nothing of how a model is loaded or answers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import CatalogueError
from ..models.catalogue import AppArgs, Entry, load_catalogue
from ..settings import Settings, wrong_settings
from .ray_internals import connect, deploy

CATALOGUE = "catalogue"  # the application at /
CATALOGUE_CPUS = 0.1  # with none it could be placed on the head
LOOK_SECONDS = 0.5
FAILED, WRONG_SETTING = 1, 2
BROKEN = {"DEPLOY_FAILED", "UNHEALTHY"}


def serve_config(settings: Settings, entries: Iterable[Entry]) -> dict[str, Any]:
    """Ray Serve's config of these models. Those that load on demand are left out: in a cluster nothing loads them."""
    kept = [entry for entry in entries if entry.load == "start"]
    shared = settings.model_dump(mode="json", include=set(AppArgs.model_fields), exclude_none=True)
    shared |= {"log_format": "text" if settings.log_format == "text" else "json"}
    applications = [
        {
            "name": CATALOGUE,
            "route_prefix": "/",
            "import_path": "lab_model.serving.cluster_app:build_cluster_app",
            "args": {
                "cpus": CATALOGUE_CPUS,
                "allowed_hosts": list(settings.allowed_hosts),
                "log_format": shared["log_format"],
                "entries": [_line(entry) for entry in kept],
            },
        }
    ]
    for entry in kept:
        on_gpu = settings.device == "cuda" and entry.device not in ("cpu", "mps")
        reserved = {"cpus": settings.replica_cpus, "gpus": 1 if on_gpu else 0}
        applications.append(
            {
                "name": entry.id,
                "route_prefix": f"/m/{entry.id}",
                "import_path": "lab_model.serving.replica:build_app",
                "args": shared | reserved | {"entry": _line(entry)},
            }
        )
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": settings.host, "port": settings.port, "keep_alive_timeout_s": 75},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": applications,
    }


def main(argv: Sequence[str]) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m lab_model.serving.deploy", description=__doc__)
    parser.add_argument("--wait", action="store_true", help="return when every model answers")
    parser.add_argument("--print", action="store_true", help="print Ray Serve's config file; deploy nothing")
    options = parser.parse_args(argv)
    try:
        settings = Settings()
        entries = load_catalogue(settings.catalogue_file, settings.folder)
    except ValidationError as error:
        for line in wrong_settings(error):
            say(line)
        return WRONG_SETTING
    except CatalogueError as error:
        say(str(error))
        return WRONG_SETTING
    config = serve_config(settings, entries)
    if options.print:
        sys.stdout.write(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        return 0
    names = [application["name"] for application in config["applications"]]
    for left_out in (entry.id for entry in entries if entry.id not in names):
        say(f"{left_out} is left out: it loads on demand, and nothing does that in a cluster")
    connect()
    deploy(config)
    say(f"given to Ray Serve: {', '.join(names)}")
    most = max(entry.most_replicas for entry in entries)  # they are replaced one after the other
    return wait_for(set(names), settings.start_timeout_seconds * most) if options.wait else 0


def wait_for(names: set[str], seconds: float) -> int:
    """Return when these applications run as they were given to Serve, and others are gone: 0; or when one cannot, or
    after `seconds`: 1."""
    from ray import serve  # noqa: PLC0415 - Ray reads its variables when it is imported

    until, found = time.monotonic() + seconds, dict[str, str]()
    while time.monotonic() < until:
        found = {name: str(each.status.value) for name, each in serve.status().applications.items()}
        if broken := sorted(name for name in names if found.get(name) in BROKEN):
            say(f"not deployed: {', '.join(broken)}; the log says why")
            return FAILED
        if found == dict.fromkeys(names, "RUNNING"):
            say("every model answers")
            return 0
        time.sleep(LOOK_SECONDS)
    say(f"not all of them answer after {seconds:.0f} s: {found}")
    return FAILED


def _line(entry: Entry) -> dict[str, Any]:
    """The entry as a line of the catalogue."""
    return entry.model_dump(mode="json", exclude_defaults=True)


def say(line: str) -> None:
    print(f"model: {line}", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
