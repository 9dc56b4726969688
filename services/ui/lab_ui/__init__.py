"""The lab in the browser: pages to ask, look inside and measure, through the proxy and nothing else."""

__version__ = "0.1.0"
