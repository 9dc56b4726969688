"""Before a pod of Ray ends: `python -m lab_model.serving.drain_node`, the preStop of k8s/model/rayservice.

Serve starts other replicas in place of this node's and lets their answers end; then the Ray node ends by itself, and
the container with it. Exit code 1 where Ray cannot be reached: then nothing is left to wait for.
"""

from __future__ import annotations

import os
import sys
import time

import psutil

from .ray_internals import drain_node

DRAIN_SECONDS = 640  # less than terminationGracePeriodSeconds, more than the longest answer


def main() -> int:
    """MY_POD_IP is the pod's own address. The exit code."""
    try:
        node = drain_node(os.environ["MY_POD_IP"], DRAIN_SECONDS)
    except Exception as error:
        print(f"model: the node is not drained: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print(f"model: draining the Ray node {node}", file=sys.stderr, flush=True)  # noqa: T201
    until = time.monotonic() + DRAIN_SECONDS
    while time.monotonic() < until and any(each.name() == "raylet" for each in psutil.process_iter()):
        time.sleep(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
