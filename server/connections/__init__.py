"""Client connections: how many, how large their heads, how slow; the one listener beside vLLM's."""
