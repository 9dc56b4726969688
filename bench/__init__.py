"""Measurements beside their targets. Not a package of the services: it starts them and looks at them from outside."""
