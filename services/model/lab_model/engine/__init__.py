"""Continuous batching: token ids in, token ids out.

Knows requests, KV pages and sampling. Knows nothing of HTTP, Ray, text or model files.
"""
