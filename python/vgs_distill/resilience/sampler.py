"""The order of the prompts in an epoch, such that a resumed run meets the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch.utils.data import Sampler

if TYPE_CHECKING:
    from trl.trainer.utils import RepeatSampler


class EpochOrder(Sampler[int]):
    """TRL's sampler, in an order that follows from the seed and the epoch alone.

    TRL's own goes on from where the last epoch left its generator, which a run resumed in a later epoch cannot know.
    The epoch is asked for, not told: accelerate's `set_epoch` does not reach a sampler below a skipped and sharded one.
    """

    def __init__(self, sampler: RepeatSampler, epoch: Callable[[], int]) -> None:
        self._sampler = sampler
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self._sampler.shuffle:
            self._sampler.generator.manual_seed((self._sampler.seed or 0) + self._epoch())
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)
