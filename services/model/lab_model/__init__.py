"""model: language models behind OpenAI's HTTP API, on Ray Serve.

The rooms, in the order in which a request meets them; each imports only later ones: `serving` (Ray), `models` (the
catalogue), `api` (HTTP), `text` (tokens and text), `encoders` and `runners` (forwards), `engine` (batching), `weights`.
"""

__version__ = "0.1.0"
