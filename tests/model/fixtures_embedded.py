"""Where our kernels can run: for test_embedded.py and test_native.py."""

from __future__ import annotations

import pytest
from lab_model.runners import kernels as c_kernels


def missing() -> str | None:
    """What this machine lacks for them, or for the one in LAB_KERNELS; sources that do not compile are no lack."""
    try:
        c_kernels._runnable()
    except c_kernels.KernelError as error:
        return str(error)
    return None if c_kernels._compiler() else "no compiler"


kernels = pytest.mark.skipif(missing() is not None, reason=f"no kernels here: {missing()}")
