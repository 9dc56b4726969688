"""model: real language models behind OpenAI's HTTP API, on Ray Serve.

A request meets the modules in this order: `serve` (Ray's deployments), `api` (HTTP), `wire` (what is accepted, what is
answered), `text` (templates, tokens, stop strings), `engine` (token ids in, token ids out) or `embedding`.
"""

__version__ = "0.1.0"
