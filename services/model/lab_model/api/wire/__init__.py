"""OpenAI's wire format: the fields of requests and the JSON of answers.

Knows JSON fields and their limits. Knows nothing of HTTP servers, tokens or models.
"""
