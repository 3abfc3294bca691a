"""The vLLM side, and the only place that reaches into vLLM's internals.

plugin         entry point: checks the seams, registers the classes below
seams          the supported version, and every name of vLLM this package depends on
unsupported    modes of vLLM that are refused
moe_runner     THE MoE LAYER: vLLM's runner plus the delta
base_router    what the delta needs to know of the base's router
manager        adapters riding on LoRA requests: residency, and the plan of each step
pool           the row pool
worker         what other processes may ask a worker
"""
