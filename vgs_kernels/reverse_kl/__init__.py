"""Reverse KL on logits, the loss of on-policy distillation."""

from .api import reverse_kl

__all__ = ["reverse_kl"]
