"""Weights as data: the GGUF format, linear layers, the tensors of a Llama.

Knows files and tensors. Knows nothing of how a forward uses them.
"""
