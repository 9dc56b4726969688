#!/bin/sh
# Finds a Python that can run the lab and runs lab/install.py with it. Written in POSIX sh because it must run where no
# Python is installed. .venv's own Python is tried first, then 3.11, because the images have it.
# The next line also works in a checkout with Windows line endings, because of the comment at its end.
if grep -q "$(printf '\r')" "$0"; then echo "lab: this checkout has Windows line endings (CRLF), which a shell cannot run; clone again: git -c core.autocrlf=false clone" >&2; exit 11; fi # CR
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
    # uv installs Python versions outside PATH.
    python=$(uv python find --no-project '>=3.11,<3.15' 2>/dev/null) && try "$python" && exec "$python" -m lab.install "$@"
fi

if command -v uv >/dev/null; then
    get="uv python install 3.12, then the same command"
else
    get="curl -LsSf https://astral.sh/uv/install.sh | sh, then in a new terminal: uv python install 3.12, then the same command"
fi
if [ -n "$without_venv" ]; then
    echo "lab: $without_venv lacks the venv module, which the installation needs; on Debian and Ubuntu: apt-get install python3-venv; elsewhere: $get" >&2
else
    echo "lab: Python 3.11 to 3.14 is needed (ray and torch have no wheels for others), found:${seen:- none}; install one: $get; or name an installed one: PYTHON=/path/to/python3.12 sh lab/run.sh $1" >&2
fi
exit 10
