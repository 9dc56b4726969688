"""Encoder models: token ids in, vectors out, one forward at a time.

Knows tensors. Knows nothing of HTTP or text.
"""
