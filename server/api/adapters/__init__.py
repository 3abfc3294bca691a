"""The routes under /v1/adapters (docs/api.md)."""
