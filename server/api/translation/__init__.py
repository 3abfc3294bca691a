"""How errors of pydantic and of vLLM become ours."""
