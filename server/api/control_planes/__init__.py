"""What control planes ask of an engine, in vLLM's words."""
