"""Many replicas of the server under Ray Serve LLM with direct streaming: `perft ray up`, or Ray's own `serve run`."""
