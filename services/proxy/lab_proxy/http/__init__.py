"""HTTP: the ASGI app, guards, pages, response writing, the draining server. Does not produce answers."""
