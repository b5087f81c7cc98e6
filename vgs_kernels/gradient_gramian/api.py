"""`gradient_gramian`: the public function. Validates, reduces over processes, shapes the result.

Layer: public API. Chooses through `vgs_kernels.backend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from .. import backend as backends

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def gradient_gramian(
    grads_lang: Sequence[Tensor | None],
    grads_vis: Sequence[Tensor | None],
    *,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The 2×2 Gramian of two gradients that are spread over lists of tensors.

    $$G = \begin{pmatrix} \langle L, L\rangle & \langle L, V\rangle \\
    \langle V, L\rangle & \langle V, V\rangle \end{pmatrix}$$

    where L and V are the concatenations of the two lists. Everything steering needs follows from it: both norms, their
    cosine, and the norm of any combination.

    Args:
        grads_lang: Gradients of the language part, one per parameter, any shapes; None counts as zero.
        grads_vis: Gradients of the visual part, of the same shapes; None counts as zero.
        process_group: Sum the three numbers over this group, for parameters sharded across processes (FSDP). Leave
            out when every process holds whole, already averaged gradients (DDP).
        backend: ``"native"``, ``"foreach"``, ``"reference"`` or None for the fastest that runs on the device.

    Returns:
        Shape (2, 2), float32 (float64 if a gradient is float64), on the gradients' device. Deterministic, no host
        synchronisation.

    Raises:
        ValueError: The lists differ in length, a pair differs in shape, device or placement, every entry is None, or a
            gradient is sparse, not of a floating dtype of 16, 32 or 64 bits, or a DTensor still to be reduced.

    Examples:
        >>> import torch
        >>> from vgs_kernels import gradient_gramian
        >>> gradient_gramian([torch.tensor([3.0, 4.0])], [torch.tensor([1.0, 0.0])])
        tensor([[25.,  3.],
                [ 3.,  1.]])
    """
    device, dtype = check_gradient_lists(grads_lang, grads_vis)
    chosen = backends.resolve("gradient_gramian", device, backend)
    lang, vis = [local_shard(g) for g in grads_lang], [local_shard(g) for g in grads_vis]
    products = backends.load("gradient_gramian", chosen).inner_products(lang, vis, dtype)
    if process_group is not None:
        torch.distributed.all_reduce(products, group=process_group)
    return products[[0, 1, 1, 2]].reshape(2, 2)


def check_gradient_lists(
    grads_lang: Sequence[Tensor | None], grads_vis: Sequence[Tensor | None]
) -> tuple[torch.device, torch.dtype]:
    """Return the device of the gradients and the dtype to accumulate in."""
    if len(grads_lang) != len(grads_vis):
        raise ValueError(
            f"grads_lang has {len(grads_lang)} entries and grads_vis {len(grads_vis)}; "
            "pass one per parameter in both, None where there is no gradient"
        )
    given = [g for g in (*grads_lang, *grads_vis) if g is not None]
    if not given:
        raise ValueError("every gradient is None; pass at least one tensor")
    for index, (lang, vis) in enumerate(zip(grads_lang, grads_vis, strict=True)):
        if lang is None or vis is None:
            continue
        if lang.shape != vis.shape:
            raise ValueError(
                f"gradient {index} has shape {tuple(lang.shape)} in grads_lang but {tuple(vis.shape)} in grads_vis"
            )
        if _placements(lang) != _placements(vis):
            raise ValueError(
                f"gradient {index} is placed as {_placements(lang)} in grads_lang but {_placements(vis)} in grads_vis; "
                "redistribute one of them"
            )
    device = given[0].device
    for gradient in given:
        if gradient.device != device:
            raise ValueError(f"gradients are on both {device} and {gradient.device}; call once per device and add")
        if gradient.layout != torch.strided:
            raise ValueError(f"gradients must be dense, got {gradient.layout}; an Embedding has sparse=False")
        if gradient.dtype not in DTYPES:
            raise ValueError(f"gradients must be float32, bfloat16, float16 or float64, got {gradient.dtype}")
        if any(isinstance(placement, Partial) for placement in _placements(gradient) or ()):
            raise ValueError("a gradient is a DTensor with a Partial placement; reduce it first (redistribute)")
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in given) else torch.float32
    return device, dtype


def _placements(gradient: Tensor) -> tuple[object, ...] | None:
    return gradient.placements if isinstance(gradient, DTensor) else None


def local_shard(gradient: Tensor | None) -> Tensor | None:
    """The shard this process holds, of a DTensor; any other tensor as it is."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
