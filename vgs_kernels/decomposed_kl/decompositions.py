"""What names a decomposition: its streams, its parts as sums of the numbers that the kernels form, and its gradients.

A part is a row of coefficients on the three numbers of `stream_kl` that depend on the student: H(p), KL(p || q) and the
third, KL(p || q*) with a masked student and KL(p || r) without.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..stream_kl.reference import DEPENDENCY, ENTROPY, LANGUAGE, STANDARD, THIRD
from ..types import DecomposedKL

Coefficients = tuple[float, float, float]  # of ENTROPY, STANDARD, THIRD


@dataclass(frozen=True)
class Decomposition:
    """One decomposition of KL(p || q)."""

    name: str
    has_masked_student: bool
    standard: Coefficients
    vis: Coefficients
    lang: Coefficients | None  # None: it does not depend on the student that sees, and has no gradient here
    parts: tuple[str, str]  # the two that are differentiable, each by itself, where no objective is asked for

    def coefficients_of(self, part: str) -> Coefficients | None:
        return {"standard": self.standard, "vis": self.vis, "lang": self.lang}[part]

    def coefficients(self, part: str, weights: Tensor) -> Tensor:  # (tokens,) -> (tokens, 3)
        """d (sum of weight * part) / d the three numbers."""
        of_part = self.coefficients_of(part)
        assert of_part is not None
        return torch.stack([weights * c for c in of_part], -1)

    def per_token(self, values: Tensor) -> DecomposedKL:  # (tokens, 5)
        """The parts of every token. What has no gradient is detached."""
        standard, third = values[:, STANDARD], values[:, THIRD]
        if self.has_masked_student:
            lang, dependency = values[:, LANGUAGE].detach(), values[:, DEPENDENCY].detach()
            return DecomposedKL(standard, third, lang, values[:, ENTROPY], dependency)
        # inf - inf would be NaN, and finite - inf would call a missing token a gain.
        vis = torch.where(standard.isinf() | third.isinf(), math.inf, standard - third)
        return DecomposedKL(standard, vis, third, values[:, ENTROPY], None)


DECOMPOSITIONS = {
    "vgs": Decomposition(
        "vgs", True, standard=(0, 1, 0), vis=(0, 0, 1), lang=None, parts=("standard", "vis")
    ),
    "teacher_prior": Decomposition(
        "teacher_prior", False, standard=(0, 1, 0), vis=(0, 1, -1), lang=(0, 0, 1), parts=("lang", "vis")
    ),
}  # fmt: skip


def find_decomposition(name: str, has_masked_student: bool, argument: str) -> Decomposition:
    """The decomposition of that name; `argument` is what the masked student is called in the call."""
    if name not in DECOMPOSITIONS:
        raise ValueError(f"unknown decomposition {name!r}; choose one of {', '.join(DECOMPOSITIONS)}")
    found = DECOMPOSITIONS[name]
    if found.has_masked_student and not has_masked_student:
        raise ValueError(
            f"decomposition {name!r} needs {argument} (the student run on the text-only prompt); "
            "pass it, or use decomposition='teacher_prior', which does without"
        )
    if has_masked_student and not found.has_masked_student:
        raise ValueError(f"decomposition {name!r} does not use {argument}; leave it out or use 'vgs'")
    return found
