"""The lab's web pages: ask models, look inside them, measure. All requests to models go through the proxy."""

__version__ = "0.1.0"
