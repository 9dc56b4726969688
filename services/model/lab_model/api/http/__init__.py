"""Each HTTP request: dispatch, errors, log line, metrics, recorded usage, disconnects.

Knows HTTP. Knows nothing of models and imports no torch.
"""
