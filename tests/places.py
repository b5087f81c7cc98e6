"""Where the tests of the ops run: on every device of this machine, by every backend that it has there.

A test that takes `chosen` or `module` (fixtures of stream_kl's backends) or `name` (of steering's) runs once in each
place. There new tensors lie on its device, problems are drawn in the widest dtype that its backend computes in, and
where that is float32, `torch.testing.assert_close` allows what float32 sums differ by. Random numbers come from the
CPU, so that a problem is the same in every place. With TRITON_INTERPRET=1 Triton's interpreter is a place as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch

from vgs_kernels import backend

FLOAT32 = {"rtol": 1e-3, "atol": 1e-4}  # of sums of some hundred terms of size 1 to 10: logic errors are far larger


@dataclass(frozen=True)
class Place:
    device: str
    backend: str
    dtype: torch.dtype = torch.float64  # the widest that the backend computes in

    def __str__(self) -> str:
        return self.backend if self.device == "cpu" else f"{self.device}-{self.backend}"


_here = Place("cpu", "reference")


def here() -> Place:
    return _here


def places(op: str) -> list[Any]:
    """Parameters for pytest; those on a GPU have its mark."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    found = [
        Place(device, name, torch.float64 if _runs(op, name, device, torch.float64) else torch.float32)
        for device in devices
        for name in backend.BACKENDS
        if _runs(op, name, device)
    ]
    return [pytest.param(place, id=str(place), marks=[pytest.mark.gpu] * (place.device != "cpu")) for place in found]


def _runs(op: str, name: str, device: str, dtype: torch.dtype | None = None) -> bool:
    return backend._problem(op, name, device, dtype=dtype) is None


@contextmanager
def at(place: Place) -> Iterator[None]:
    global _here
    before, _here = _here, place
    with ExitStack() as stack:
        if place.device != "cpu":
            stack.enter_context(torch.device(place.device))
        if place.dtype == torch.float32:
            stack.enter_context(mock.patch.object(torch.testing, "assert_close", _assert_close_in_float32))
        try:
            yield
        finally:
            _here = before


_assert_close = torch.testing.assert_close


def _assert_close_in_float32(actual: Any, expected: Any, **options: Any) -> None:
    wider = {key: max(limit, options.get(key) or 0.0) for key, limit in FLOAT32.items()}
    _assert_close(actual, expected, **(options | wider | {"check_dtype": False}))


def visit(request: pytest.FixtureRequest) -> Iterator[Place]:
    """The place of a fixture's parameter, in force while the test runs; skipped for a dtype that it cannot compute."""
    callspec = getattr(request.node, "callspec", None)
    dtype = callspec.params.get("dtype") if callspec is not None else None
    if dtype == torch.float64 and request.param.dtype != torch.float64:
        pytest.skip(f"{request.param.backend} does not compute in float64")
    with at(request.param):
        yield request.param
