"""`combine_gradients`: the public function. Validates, folds clipping into the weights, returns the norm.

Layer: public API. Chooses through `vgs_kernels.backend`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .. import backend as backends
from ..gradient_gramian.api import DTYPES, check_gradient_lists, gradient_gramian, local_shard


def combine_gradients(
    grads_lang: Sequence[Tensor | None],
    grads_vis: Sequence[Tensor | None],
    weights: Tensor,  # (2,)
    *,
    out: Sequence[Tensor],
    max_norm: float | None = None,
    gramian: Tensor | None = None,  # (2, 2)
    backend: str | None = None,
) -> Tensor:
    r"""Combine two gradients in place, and clip the result's global norm without another pass.

    $$g = c\,(w_0 L + w_1 V), \quad c = \min\bigl(1, \text{max_norm} / (\lVert w_0 L + w_1 V\rVert +
    10^{-6})\bigr), \quad \lVert w_0 L + w_1 V\rVert^2 = w^\top G w$$

    with G the `gradient_gramian` of (L, V). ``c`` is that of ``torch.nn.utils.clip_grad_norm_``.

    Args:
        grads_lang: L, one tensor per parameter; None counts as zero.
        grads_vis: V, of the same shapes; None counts as zero.
        weights: w, shape (2,), on the device of the gradients; read there. A weight of 0 removes its component
            even where that holds inf or NaN.
        out: Where g goes, one tensor per parameter; may be the tensors of ``grads_lang`` or ``grads_vis`` beside them,
            but must not overlap them in any other way.
        max_norm: Largest global norm of g; None for no clipping.
        gramian: G, if it is already known; computed otherwise. Sharded gradients (DTensor) need it, summed over their
            processes: one process alone does not know the norm.
        backend: ``"native"``, ``"foreach"``, ``"reference"`` or None for the fastest that runs on the device.

    Returns:
        The global norm of what was written to ``out``, a scalar on the device. Deterministic, no host synchronisation.

    Raises:
        ValueError: What `gradient_gramian` raises, or ``out``, ``weights``, ``max_norm`` or
            ``gramian`` do not fit; nothing has been written.
    """
    device, _ = check_gradient_lists(grads_lang, grads_vis)
    if len(out) != len(grads_lang):
        raise ValueError(f"out has {len(out)} tensors for {len(grads_lang)} gradients; pass one per parameter")
    for index, (lang, vis, result) in enumerate(zip(grads_lang, grads_vis, out, strict=True)):
        source = lang if lang is not None else vis
        if source is not None and source.shape != result.shape:
            raise ValueError(f"out[{index}] has shape {tuple(result.shape)}, its gradient {tuple(source.shape)}")
        if result.dtype not in DTYPES:
            raise ValueError(f"out must be float32, bfloat16, float16 or float64, got {result.dtype}")
    if weights.shape != (2,) or weights.device != device:
        raise ValueError(f"weights must have shape (2,) on {device}, got {tuple(weights.shape)} on {weights.device}")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    if gramian is None and any(isinstance(gradient, DTensor) for gradient in (*grads_lang, *grads_vis)):
        raise ValueError("sharded gradients need gramian=gradient_gramian(..., process_group=...)")
    if gramian is not None and gramian.shape != (2, 2):
        raise ValueError(f"gramian must have shape (2, 2), got {tuple(gramian.shape)}")
    chosen = backends.resolve("combine_gradients", device, backend)
    if gramian is None:
        gramian = gradient_gramian(grads_lang, grads_vis)
    weights = weights.to(gramian.dtype)
    # A component of weight 0 may have a non-finite norm, which must not come back as 0 * inf.
    kept = weights != 0
    gramian = torch.where(kept[:, None] & kept[None, :], gramian, 0.0)
    # Spelled out: autocast would run `weights @ gramian` in 16 bits.
    norm = (weights[:, None] * gramian * weights).sum().clamp(min=0.0).sqrt()
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        weights, norm = weights * factor, norm * factor
    backends.load("combine_gradients", chosen).combine(
        [local_shard(g) for g in grads_lang],
        [local_shard(g) for g in grads_vis],
        weights,
        [local_shard(g) for g in out],
    )
    return norm
