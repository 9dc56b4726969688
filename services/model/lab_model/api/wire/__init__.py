"""OpenAI's wire format: what a request may hold and how an answer is written.

Knows JSON fields and their limits. Knows nothing of HTTP servers, tokens or models.
"""
