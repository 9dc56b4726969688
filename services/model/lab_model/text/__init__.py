"""Text to token ids and back: tokenizers, chat templates, stop strings, tool calls, grammars.

Knows tokenizers and the engine's output. Knows nothing of HTTP or of model weights.
"""
