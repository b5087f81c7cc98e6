"""Weighted combination of two gradients, clipping included: `reference.py` specifies, `api.py` is the function."""

from .api import combine_gradients

__all__ = ["combine_gradients"]
