"""Load tests of the lab, with Locust."""

__version__ = "0.1.0"
