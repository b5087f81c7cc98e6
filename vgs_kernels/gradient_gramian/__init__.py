"""The 2x2 Gramian of two gradients over lists of tensors: `reference.py` specifies, `api.py` is the function."""

from .api import gradient_gramian

__all__ = ["gradient_gramian"]
