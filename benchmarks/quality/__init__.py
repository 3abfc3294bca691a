"""The paper's comparison at a small scale: PERFT beside LoRA at equal activated parameters (docs/quality.md).

    python -m benchmarks.quality pretrain   # the small OLMoE, once: benchmarks/quality/base
    python -m benchmarks.quality run        # the runs that have no result yet, one file each
    python -m benchmarks.quality page       # docs/quality.md and its pictures, from the result files alone
    python -m benchmarks.quality check      # one tiny cell end to end

Every step is seeded, and goes on where it was stopped.
"""
