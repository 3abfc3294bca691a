"""PERFT, the method: configuration, reference, operator, trainable modules (arXiv 2411.08212).

Dimension letters, used in tensor names throughout (`x_TD` is a [T, D] tensor):

    T   tokens                        D   hidden size of the base model
    N   base experts                  J   base experts a token uses (K_base in the paper's code)
    M   PEFT experts of an adapter    K   PEFT experts a token uses
    B   bottleneck of a PEFT expert (LoRA rank, or hidden width of a parallel adapter)
    R   rows of the row pool          n   tokens of one adapter in a batch

Nothing here imports vLLM except the package `perft.engine`.
"""
