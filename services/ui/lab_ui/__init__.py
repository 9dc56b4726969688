"""The lab in the browser: chat and status, through the proxy and nothing else."""

__version__ = "0.1.0"
