"""Runs the lab as local processes, as compose.yaml runs it in containers."""
