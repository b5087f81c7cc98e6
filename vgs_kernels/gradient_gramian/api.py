"""`gradient_gramian`: the public function. Validates, sums over the processes that hold parts, shapes the result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from .. import backend as backends

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def gradient_gramian(
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    *,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The 2×2 Gramian of two gradients that are spread over lists of tensors.

    $$G = \begin{pmatrix} \langle A, A\rangle & \langle A, B\rangle \\
    \langle B, A\rangle & \langle B, B\rangle \end{pmatrix}$$

    where A and B are the concatenations of the two lists. Everything steering needs follows from it: both norms, their
    cosine, and the norm of any combination.

    Args:
        first: A, one tensor per parameter, any shapes; None counts as zero.
        second: B, of the same shapes; None counts as zero.
        process_group: Sum what plain tensors give over this group: they are parts of gradients, of which every process
            holds its own. Leave out when every process holds whole, already averaged gradients (DDP). A DTensor says
            by its placements which processes hold its parts (FSDP2, tensor parallelism): it is summed over those,
            replicas counted once, whatever this argument says.
        backend: ``"native"``, ``"triton"``, ``"foreach"``, ``"reference"`` or None for the fastest that runs
            on the device.

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
    device, dtype = check_gradient_lists(first, second)
    kernels = backends.load("gradient_gramian", backends.resolve("gradient_gramian", device, backend))
    total = None
    for groups, indices in _by_groups(first, second, process_group).items():
        products = kernels.inner_products(
            [local_shard(first[i]) for i in indices], [local_shard(second[i]) for i in indices], dtype
        )
        for group in groups:
            torch.distributed.all_reduce(products, group=group)
        total = products if total is None else total + products
    assert total is not None  # at least one tensor was given
    return torch.stack([total[0], total[1], total[1], total[2]]).reshape(2, 2)


def _by_groups(
    first: Sequence[Tensor | None], second: Sequence[Tensor | None], process_group: ProcessGroup | None
) -> dict[tuple[ProcessGroup, ...], list[int]]:
    """Indices of the pairs, by the groups of processes over which their inner products are summed one after another."""
    of_plain_tensors = () if process_group is None else (process_group,)
    found: dict[tuple[ProcessGroup, ...], list[int]] = {}
    for index, pair in enumerate(zip(first, second, strict=True)):
        gradient = pair[0] if pair[0] is not None else pair[1]
        if gradient is not None:
            groups = _groups_of_parts(gradient) if isinstance(gradient, DTensor) else of_plain_tensors
            found.setdefault(groups, []).append(index)
    return found


def _groups_of_parts(gradient: DTensor) -> tuple[ProcessGroup, ...]:
    """Of every dimension of the mesh that holds different parts; those that hold replicas are left out."""
    mesh = gradient.device_mesh
    return tuple(mesh.get_group(i) for i, p in enumerate(gradient.placements) if not isinstance(p, Replicate))


def check_gradient_lists(
    first: Sequence[Tensor | None], second: Sequence[Tensor | None]
) -> tuple[torch.device, torch.dtype]:
    """Return the device of the gradients and the dtype to accumulate in."""
    if len(first) != len(second):
        raise ValueError(
            f"first has {len(first)} entries and second {len(second)}; "
            "pass one per parameter in both, None where there is no gradient"
        )
    given = [gradient for gradient in (*first, *second) if gradient is not None]
    if not given:
        raise ValueError("every gradient is None; pass at least one tensor")
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        if a is not None and b is not None:
            check_alike(f"second[{index}]", b, f"first[{index}]", a)
    check_gradients("gradients", given, given[0].device)
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in given) else torch.float32
    return given[0].device, dtype


def check_alike(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Two tensors of one parameter have one shape and, as DTensors, one mesh and placement."""
    if tensor.shape != other.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but {other_name} has {tuple(other.shape)}")
    if _placement(tensor) != _placement(other):
        raise ValueError(
            f"{name} is placed as {_placement(tensor)}, but {other_name} as {_placement(other)}; "
            "redistribute one of them"
        )


def check_gradients(name: str, tensors: Iterable[Tensor], device: torch.device) -> None:
    """What the kernels take: dense tensors on one device, of a dtype that they compute in, reduced."""
    for tensor in tensors:
        if tensor.device != device:
            raise ValueError(f"{name} are on both {device} and {tensor.device}; call once per device and add")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} must be dense, got {tensor.layout}; an Embedding has sparse=False")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if isinstance(tensor, DTensor) and any(isinstance(placement, Partial) for placement in tensor.placements):
            raise ValueError(f"{name} hold a DTensor with a Partial placement; reduce it first (redistribute)")


def _placement(tensor: Tensor) -> object:
    return (tensor.placements, tensor.device_mesh) if isinstance(tensor, DTensor) else None


def local_shard(gradient: Tensor | None) -> Tensor | None:
    """The shard this process holds, of a DTensor; any other tensor as it is."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
