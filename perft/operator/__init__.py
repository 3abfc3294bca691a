"""The one operator of PERFT: what a mixed batch of adapters adds to the output of one MoE layer.

    y[t] += sum_k weight[t, k] * scale[seg] * Up[seg] act(Down[seg] x[t])        seg = segment[t, k]

A segment is the run of B rows of the row pool that holds one PEFT expert of one adapter at one layer (`scale` is folded
into its up rows). The variants differ only in which (token, segment, weight) triples there are: R takes the K its own
router picked, E those of the base's top-k, D and S all of the adapter's with weight 1, a token without an adapter none.
"""

from perft.operator.base import Batch, Delta, LayerRows, Operator, PlacedAdapter, Step, TokenGroup
from perft.operator.choose import choose_operator

__all__ = ["Batch", "Delta", "LayerRows", "Operator", "PlacedAdapter", "Step", "TokenGroup", "choose_operator"]
