"""`steer_`: two losses in, `.grad` out, the one call that a training loop of one's own needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

from .combine_gradients import combine_gradients
from .gradient_gramian import gradient_gramian


class Steered(NamedTuple):
    """What `vgs_kernels.steer_` measured and did; on the device of the gradients."""

    gramian: Tensor  # (2, 2), of the gradients of the two losses
    weights: Tensor  # (2,), of these gradients, before clipping
    norm: Tensor  # (), of what was added to `.grad`


def steer_(
    parameters: Iterable[Tensor],
    first: Tensor,  # ()
    second: Tensor,  # ()
    policy: Callable[[Tensor], Tensor],
    *,
    max_norm: float | None = None,
) -> Steered:
    r"""Add the steered gradient of two losses to ``.grad``.

    $$\text{grad} \mathrel{+}= c\,(w_0 \nabla\text{first} + w_1 \nabla\text{second}), \qquad w = \text{policy}(G)$$

    with G the 2×2 `gradient_gramian` of the two gradients over all parameters and c what clips the sum to ``max_norm``.

    Args:
        parameters: What is trained. Those that need no gradient are passed over.
        first: The first loss: ``standard`` for `VisualGradientSteering`, ``lang`` for `UnitGradients`.
        second: The second loss, ``vis``. The two may share a graph, which is freed afterwards.
        policy: From the Gramian, (2, 2), to two weights, (2,).
        max_norm: Largest global norm of what is added; None for no clipping.

    Returns:
        Steered: the Gramian, the weights and the norm. No host synchronisation.

    ``backward`` runs once for each loss, so checkpointing and hooks work as they do there. DDP averages in the first of
    two backward passes only: there, use `gradient_gramian` and `combine_gradients` on gradients that are averaged.

    Raises:
        ValueError: No parameter got a gradient, or what `combine_gradients` raises.

    Examples:
        >>> import torch
        >>> from vgs_kernels import VisualGradientSteering, steer_
        >>> weight = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> steered = steer_([weight], weight[0], 2 * weight[1], VisualGradientSteering(gamma=2.0))
        >>> weight.grad
        tensor([0.2425, 0.9701])
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    before = [parameter.grad for parameter in trained]
    _clear(trained)
    first.backward(retain_graph=True)
    of_first = [parameter.grad for parameter in trained]
    _clear(trained)
    second.backward()
    of_second = [parameter.grad for parameter in trained]
    # Into the gradients themselves: nobody else holds them.
    out = [b if a is None else a for a, b in zip(of_first, of_second, strict=True)]
    kept = [index for index, gradient in enumerate(out) if gradient is not None]
    pair = [of_first[i] for i in kept], [of_second[i] for i in kept]
    for parameter, gradient in zip(trained, before, strict=True):
        parameter.grad = gradient
    gramian = gradient_gramian(*pair)
    weights = policy(gramian)
    targets = [gradient for gradient in out if gradient is not None]
    norm = combine_gradients(*pair, weights, out=targets, max_norm=max_norm, gramian=gramian)
    for index, gradient in zip(kept, targets, strict=True):
        existing = before[index]
        trained[index].grad = gradient if existing is None else existing.add_(gradient)
    return Steered(gramian, weights, norm)


def _clear(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None
