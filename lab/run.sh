#!/bin/sh
# Finds a Python that can run the lab and hands the command over to lab/install.py. POSIX sh: it is the one file that must
# run where no Python does. 3.11 comes first because the images have it; the environment's own Python before all others.
# In a checkout with Windows line ends this is the last line that works, thanks to the comment at its end.
if grep -q "$(printf '\r')" "$0"; then echo "lab: this checkout has Windows line ends (CRLF), which a shell cannot run; clone again: git -c core.autocrlf=false clone" >&2; exit 11; fi # CR
cd "$(dirname "$0")/.." || exit 11
seen=""

try() {
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || return 1
    seen="$seen $1 ($version)"
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null || return 1
    if ! "$1" -c 'import ensurepip, venv' 2>/dev/null; then
        without_venv="$1"
        return 1
    fi
}

if [ -n "$PYTHON" ]; then
    try "$PYTHON" && exec "$PYTHON" -m lab.install "$@"
else
    for python in .venv/bin/python python3.11 python3.12 python3.13 python3.14 python3; do
        try "$python" && exec "$python" -m lab.install "$@"
    done
    # uv keeps its Pythons outside PATH.
    python=$(uv python find --no-project '>=3.11,<3.15' 2>/dev/null) && try "$python" && exec "$python" -m lab.install "$@"
fi

if command -v uv >/dev/null; then
    get="uv python install 3.12, then the same command"
else
    get="curl -LsSf https://astral.sh/uv/install.sh | sh, then in a new terminal: uv python install 3.12, then the same command"
fi
if [ -n "$without_venv" ]; then
    echo "lab: $without_venv has no venv module, and the lab installs into one; on Debian and Ubuntu: apt-get install python3-venv; anywhere: $get" >&2
else
    echo "lab: Python 3.11 to 3.14 is needed (ray and torch have no wheels for others), found:${seen:- none}; install one: $get; or name one: PYTHON=/path/to/python3.12 sh lab/run.sh $1" >&2
fi
exit 10
