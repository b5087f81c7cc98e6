"""The correctness gate: errors against fp64, each beside that of what it is held to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 8192  # rows that are widened to fp64 at a time


@dataclass(frozen=True)
class Check:
    """One line of a correctness gate: an error against fp64 and what it may be."""

    name: str
    error: float
    peer_error: float  # of what it is held to
    floor: float

    @property
    def allowed(self) -> float:
        return 2 * self.peer_error + self.floor

    @property
    def passed(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.allowed


@dataclass(frozen=True)
class Gate:
    """The correctness checks of a case. No speedup without a green one."""

    checks: tuple[Check, ...]
    held_to: str = "plain torch in the same dtype"  # what the errors are compared with

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def describe(self) -> str:
        lines = [f"correctness gate: {'green' if self.passed else 'RED, so no speedups'} ({len(self.checks)} checks)"]
        worst = sorted(self.checks, key=lambda check: check.error / check.allowed if check.allowed else 0, reverse=True)
        shown = [check for check in self.checks if not check.passed] or worst[:2]
        lines += [
            f"  {'ok ' if c.passed else 'BAD'} {c.name}: error {c.error:.2e}, peer {c.peer_error:.2e}, "
            f"allowed {c.allowed:.2e}"
            for c in shown
        ]
        return "\n".join(lines)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels accumulate in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def relative_error(result: Tensor, exact: Tensor) -> float:
    """|result - exact| / |exact| in the 2-norm, in fp64; |result - exact| where `exact` is 0. Any size: in blocks."""
    norm = difference = 0.0
    rows = BLOCK if result.dim() > 1 else 1024 * BLOCK
    for mine, theirs in zip(result.detach().split(rows), exact.detach().split(rows), strict=True):
        wide = theirs.to(torch.float64)
        norm += wide.square().sum().item()
        difference += (mine.to(torch.float64) - wide).square().sum().item()
    return math.sqrt(difference / norm) if norm else math.sqrt(difference)
