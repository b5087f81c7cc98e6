"""The losses of a micro-batch wait for no tensor once its tokens are found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from vgs_distill import VGSTrainer
from vgs_distill.loss import MicroBatch
from vgs_distill.steering.step import ViewLoss

from tests.gpu_loop import HostWait, gpu_loop

SETTINGS: list[dict[str, Any]] = [
    {"method": "opd"},
    {"method": "vgs", "eta": 0.4, "language_preservation": 1.0, "dependency_quantile": 0.4},
    {"method": "vgs", "eta": 0.4, "token_steering": "dependency"},
    {"method": "matched"},
    {"method": "teacher_prior", "token_steering": 2.0, "plausibility": 0.1},
    {"method": "language", "eta": 0.4, "language_preservation": 1.0, "dependency_quantile": 0.4},
]


def unwatched(function: Callable[..., Any]) -> Callable[..., Any]:
    """Models are transformers'."""

    def run(*args: Any, **options: Any) -> Any:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return function(*args, **options)

    return run


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Refuses waits while the losses of a view are formed; how many operations each took."""
    original, counts = MicroBatch.__iter__, []

    def views(self: MicroBatch) -> Iterator[ViewLoss]:
        for name in ("run_student", "run_teacher", "masked_view"):
            monkeypatch.setattr(self._loss, name, unwatched(getattr(self._loss, name)))
        iterator = original(self)
        while True:
            with gpu_loop(host="", tokens=4, multiple=2) as loop:
                view = next(iterator, None)
            if view is None:
                return
            counts.append(len(loop.work))
            yield view

    monkeypatch.setattr(MicroBatch, "__iter__", views)
    return counts


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_no_loss_waits(make_trainer: Callable[..., VGSTrainer], settings: dict[str, Any], watched: list[int]) -> None:
    trainer = make_trainer(max_steps=1, **settings)
    trainer.train()
    assert len(watched) >= 1
    assert min(watched) > 10


def test_a_mask_as_an_index_is_seen(make_trainer: Callable[..., VGSTrainer], watched: list[int]) -> None:
    trainer = make_trainer(max_steps=1, method="opd")
    find = MicroBatch._agree

    def planted(self: MicroBatch, *masks: torch.Tensor) -> Any:
        found = find(self, *masks)
        inner = self._token_weights
        self._token_weights = lambda hidden: inner(hidden)[torch.ones(len(hidden)) > 0]  # type: ignore[method-assign]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MicroBatch, "_agree", planted)
        with pytest.raises(HostWait, match="with a mask"):
            trainer.train()
