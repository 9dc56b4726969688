"""Before a Ray node ends: `python -m lab_model.serving.drain_node`, the preStop of k8s/model/rayservice.

Serve starts new replicas on other nodes and lets running answers finish; then the Ray node ends by itself, while
`ray start --block` waits for a SIGTERM. A SIGTERM alone drains for RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, 30 seconds.
Exit code 1 if Ray does not answer: then there is nothing to wait for.
"""

from __future__ import annotations

import os
import socket
import sys
import time

from .ray_internals import drain_node, living_nodes

DRAIN_SECONDS = 640  # less than terminationGracePeriodSeconds, more than the longest answer
LOOK_SECONDS = 1.0


def main() -> int:
    """Drain the node whose address is MY_POD_IP; left out: the address of this host's name. Returns the exit code."""
    try:
        address = os.environ.get("MY_POD_IP") or socket.gethostbyname(socket.gethostname())
        node = next((id_ for id_, at in living_nodes().items() if at == address), None)
        if node is None:
            return _say(f"{address} is not a node of the cluster", 1)
        drain_node(node, DRAIN_SECONDS)
        _say(f"draining the Ray node {node}", 0)
        until = time.monotonic() + DRAIN_SECONDS
        while node in living_nodes() and time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
    except Exception as error:
        return _say(f"the node could not be drained: {error}", 1)
    return 0


def _say(line: str, code: int) -> int:
    print(f"model: {line}", file=sys.stderr, flush=True)  # noqa: T201
    return code


if __name__ == "__main__":
    sys.exit(main())
