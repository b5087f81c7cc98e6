"""`combine_gradients`: the public function. Validates, folds clipping into the weights, returns the norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend as backends
from ..gradient_gramian.api import check_alike, check_gradient_lists, check_gradients, gradient_gramian, local_shard


def combine_gradients(
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    weights: Tensor,  # (2,)
    *,
    out: Sequence[Tensor],
    max_norm: float | None = None,
    gramian: Tensor | None = None,  # (2, 2)
    backend: str | None = None,
) -> Tensor:
    r"""Combine two gradients in place, and clip the result's global norm without another pass.

    $$g = c\,(w_0 A + w_1 B), \quad c = \min\bigl(1, \text{max_norm} / (\lVert w_0 A + w_1 B\rVert +
    10^{-6})\bigr), \quad \lVert w_0 A + w_1 B\rVert^2 = w^\top G w$$

    with G the `gradient_gramian` of (A, B). ``c`` is that of ``torch.nn.utils.clip_grad_norm_``.

    Args:
        first: A, one tensor per parameter; None counts as zero.
        second: B, of the same shapes; None counts as zero.
        weights: w, shape (2,), on the device of the gradients; read there. A weight of 0 removes its component
            even where that holds inf or NaN.
        out: Where g goes, one tensor per parameter, placed like its gradients; may be the tensors of ``first`` or
            ``second`` beside them, but must not overlap them in any other way.
        max_norm: Largest global norm of g; None for no clipping.
        gramian: G, if it is already known; computed otherwise. Plain tensors that are parts of gradients need it, made
            with their ``process_group``: one process alone does not know the norm.
        backend: ``"native"``, ``"triton"``, ``"foreach"``, ``"reference"`` or None for the fastest that runs
            on the device.

    Returns:
        The global norm of what was written to ``out``, a scalar on the device. Deterministic, no host synchronisation.

    Raises:
        ValueError: What `gradient_gramian` raises, or ``out``, ``weights``, ``max_norm`` or
            ``gramian`` do not fit; nothing has been written.
    """
    device, _ = check_gradient_lists(first, second)
    if len(out) != len(first):
        raise ValueError(f"out has {len(out)} tensors for {len(first)} gradients; pass one per parameter")
    for index, (a, b, result) in enumerate(zip(first, second, out, strict=True)):
        gradient = a if a is not None else b
        if gradient is not None:
            check_alike(f"out[{index}]", result, "its gradient", gradient)
    check_gradients("out and gradients", out, device)
    if weights.shape != (2,) or weights.device != device:
        raise ValueError(f"weights must have shape (2,) on {device}, got {tuple(weights.shape)} on {weights.device}")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    if gramian is not None and (gramian.shape != (2, 2) or gramian.device != device):
        raise ValueError(f"gramian must have shape (2, 2) on {device}, got {tuple(gramian.shape)} on {gramian.device}")
    chosen = backends.resolve("combine_gradients", device, backend)
    if gramian is None:
        gramian = gradient_gramian(first, second, backend=backend)
    weights = weights.to(gramian.dtype)
    # A component of weight 0 may have a non-finite norm, which must not come back as 0 * inf.
    kept = weights != 0
    # In float64, because the squares of norms that float32 holds may leave its range.
    squares = weights.double()[:, None] * torch.where(kept[:, None] & kept, gramian, 0.0).double() * weights.double()
    norm = squares.sum().clamp(min=0.0).sqrt().to(gramian.dtype)
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        weights, norm = weights * factor, norm * factor
    backends.load("combine_gradients", chosen).combine(
        [local_shard(g) for g in first],
        [local_shard(g) for g in second],
        weights,
        [local_shard(g) for g in out],
    )
    return norm
