"""The ASGI middleware, outermost first (access control, drain, adapter routing), and the access log."""
