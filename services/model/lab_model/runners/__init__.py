"""Forwards of causal models over the engine's KV pages: token ids in, logits out.

Knows weights, tensors and page numbers. Knows nothing of requests, queues or text.
"""
