"""Decomposed reverse KL on logits: `decompositions.py` names the parts, `api.py` is the function."""

from .api import decomposed_kl

__all__ = ["decomposed_kl"]
