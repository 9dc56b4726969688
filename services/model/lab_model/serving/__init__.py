"""Ray Serve: the service's process, its applications, the HTTP front.

Knows Ray, processes and ports. Knows nothing of tokens, tensors or the fields of a request.
"""
