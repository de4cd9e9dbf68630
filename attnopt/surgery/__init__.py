"""Change what a graph computes with: fewer heads, narrower heads, fewer neurons.

Works on the exact form of a program, where every attention is one canonical op. Every element of a
tensor has a number that says which head and channel it is of (`finder.provenance`); what stays is
said by number, and along the way from the projections and states to where heads or neurons are
read, every node keeps what its elements say. Sizes follow from that, and nothing goes by name.
"""

from attnopt.surgery.edit import GraphEdit, Kept
from attnopt.surgery.mlps import narrow_mlp
from attnopt.surgery.sites import narrow

__all__ = ["GraphEdit", "Kept", "narrow", "narrow_mlp"]
