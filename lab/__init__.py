"""The lab as local processes: what compose.yaml is for containers."""
