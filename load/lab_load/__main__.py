"""`python -m lab_load throughput | caching | web`: settings, target, Locust.

Exit codes: 0 fine, 1 requests failed or nothing was measured, 2 a wrong setting, 3 nothing to put load on.
"""

from __future__ import annotations

# First of all: importing locust makes sockets and time cooperative, which must come before anybody holds the old ones.
import locust  # isort: skip
import locust.main  # isort: skip

import argparse
import sys
from pathlib import Path

from pydantic import ValidationError

from .hooks import Hooks
from .settings import Settings, complaint
from .target import TargetError

SCENARIOS = ("throughput", "caching")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab_load", description="Load on the lab. Settings: LOAD_… variables."
    )
    parser.add_argument(
        "what",
        choices=[*SCENARIOS, "web"],
        help="throughput: distinct questions; caching: Zipf's law; web: Locust's web page, both to choose from",
    )
    what = parser.parse_args(argv).what
    hooks = None
    try:
        settings = Settings()
        hooks = Hooks(settings)
        if what != "web":
            hooks.prepare(settings)
    except ValidationError as error:
        print(f"load: {complaint(error)}", file=sys.stderr)  # noqa: T201 there is no log yet
        return 2
    except TargetError as error:
        print(f"load: {error}", file=sys.stderr)  # noqa: T201 as above
        return 3
    hooks.attach(locust.events)
    sys.argv = ["locust", *arguments(what, settings)]
    locust.main.main()  # type: ignore[no-untyped-call] # ends by sys.exit with Locust's code: 1 when a request failed
    return 0


def arguments(what: str, settings: Settings) -> list[str]:
    """Locust's own command line. What it takes from LOCUST_* variables or files stands behind these."""
    here = Path(__file__).parent
    scenarios = SCENARIOS if what == "web" else (what,)
    common = [
        "--locustfile", ",".join(str(here / f"{name}.py") for name in scenarios),
        "--host", settings.host,
        "--users", str(settings.users),
        "--spawn-rate", str(settings.spawn_rate),
        "--run-time", str(settings.seconds),
        "--stop-timeout", str(settings.drain_seconds),
        "--exit-code-on-error", "1",
    ]  # fmt: skip
    if what == "web":
        return [*common, "--class-picker", "--web-host", settings.web_host, "--web-port", str(settings.port)]
    return [*common, "--headless", "--only-summary", "--loglevel", "WARNING"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
