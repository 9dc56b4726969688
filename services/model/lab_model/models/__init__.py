"""The catalogue: its models, the location of their weights, the loading of each kind.

Knows every part of a loaded model and how much memory it may take. Knows nothing of Ray.
"""
