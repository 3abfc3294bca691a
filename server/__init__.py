"""The server: command line, settings, routes. vLLM's own app serves the OpenAI API; this package adds to it."""
