"""Load on the lab, by Locust."""

__version__ = "0.1.0"
