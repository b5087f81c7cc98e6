"""Reverse KL and its parts straight from hidden states and heads: `reference.py` says what, `op.py` is the operator."""

from .api import linear_decomposed_kl, linear_reverse_kl

__all__ = ["linear_decomposed_kl", "linear_reverse_kl"]
