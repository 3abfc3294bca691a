"""The engine interface, and its implementation on vLLM."""
