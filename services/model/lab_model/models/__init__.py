"""The catalogue: which models there are, where their weights lie, how each kind is loaded.

Knows every part of a loaded model and how much memory it may take. Knows nothing of Ray.
"""
