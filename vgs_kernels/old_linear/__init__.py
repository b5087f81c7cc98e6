"""Decomposed reverse KL straight from hidden states: `op.py` the chunked operator, `api.py` the public function."""

from .api import linear_decomposed_kl

__all__ = ["linear_decomposed_kl"]
