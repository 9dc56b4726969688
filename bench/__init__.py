"""Measurements and their targets. Not a part of the services: it starts them and measures them from outside."""
