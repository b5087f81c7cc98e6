"""Decomposed reverse KL on logits: `reference.py` specifies, `op.py` registers, `api.py` the function."""

from .api import decomposed_kl

__all__ = ["decomposed_kl"]
