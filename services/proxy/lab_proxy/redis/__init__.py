"""Connections to redis: address, pipelining, errors. Knows commands and replies; not what they are about."""
