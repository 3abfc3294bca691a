"""The vLLM side, and the only place that reaches into vLLM's internals."""
