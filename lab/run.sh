#!/bin/sh
# Finds a Python that can run the lab and hands the command over to lab/install.py. POSIX sh: it is the one file that must
# run where no Python does. 3.11 comes first because the images have it; the environment's own Python before all others.
cd "$(dirname "$0")/.." || exit 11
seen=""

try() {
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || return 1
    seen="$seen $1 ($version)"
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || return 1
    if ! "$1" -c 'import ensurepip, venv' 2>/dev/null; then
        without_venv="$1"
        return 1
    fi
}

if [ -n "$PYTHON" ]; then
    try "$PYTHON" && exec "$PYTHON" -m lab.install "$@"
else
    for python in .venv/bin/python python3.11 python3.12 python3.13 python3; do
        try "$python" && exec "$python" -m lab.install "$@"
    done
fi

if [ -n "$without_venv" ]; then
    echo "lab: $without_venv has no venv module, and the lab installs into one; on Debian and Ubuntu: apt-get install python3-venv" >&2
else
    echo "lab: Python 3.11 or newer is needed, found:${seen:- none}; install one, or name it: PYTHON=/path/to/python3.11 make $1" >&2
fi
exit 10
