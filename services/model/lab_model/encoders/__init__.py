"""Encoder models: from token ids to vectors, labels or spans, one forward at a time.

Knows tensors. Knows nothing of HTTP or text.
"""
