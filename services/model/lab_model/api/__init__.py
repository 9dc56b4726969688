"""OpenAI's endpoints over one loaded model.

Knows HTTP and the wire format. Knows nothing of Ray, of model files or of tensors.
"""
