"""The chunk loop of a GPU, on CPU or meta tensors: with its rule, dtypes and products, watched by a dispatch mode.

The mode multiplies 16-bit matrices into float32, which torch does on GPUs alone; writes down what every operation
reads, writes and multiplies; and refuses what would make the host wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from vgs_kernels import backend as backends
from vgs_kernels.linear import op, rule
from vgs_kernels.stream_kl.reference import STATISTICS, VALUES, Streams

aten = torch.ops.aten
WIDENING = (aten.mm.dtype_out, aten.addmm.dtype_out)
OPERATORS = {
    torch.ops.vgs_kernels.linear_kl.default: op.linear_kl,
    torch.ops.vgs_kernels.attach_gradient.default: op.attach_gradient,
}
PRODUCTS = (*WIDENING, aten.mm.out, aten.addmm.out)
# A size or a value that the host has to know: it waits until the device has found it.
# Not the temperature, which is a float64 tensor of the CPU everywhere.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero")


class HostWait(AssertionError):
    """The host would wait for the device here."""


@dataclass(frozen=True)
class Work:
    """What one operation does."""

    name: str
    flops: int
    bytes: int

    def seconds(self, flop_rate: float, bandwidth: float) -> float:
        return max(self.flops / flop_rate, self.bytes / bandwidth)


class NoPythonNumbers(TorchFunctionMode):
    """Refuses to copy Python numbers to the device: from memory that is not pinned, which the host waits for. No
    operation of theirs is dispatched."""

    def __init__(self, host: str = "cpu") -> None:
        super().__init__()
        self.host = host  # type of the device whose tensors are the host's

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") is not None
        if made and not _is_tensor(args[0]) and torch.device(kwargs["device"]).type != self.host:
            raise HostWait("a tensor of the device is made of Python numbers")
        if func is Tensor.new_tensor and args[0].device.type != self.host:
            raise HostWait("new_tensor copies Python numbers to the device")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device.type != self.host:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(place, list) for place in places):
                raise HostWait("a tensor of the device is indexed with a Python list")
        return func(*args, **kwargs)


class GpuLoop(TorchDispatchMode):
    def __init__(self, host: str = "cpu") -> None:
        super().__init__()
        self.host = host
        self.work: list[Work] = []
        self.products: list[tuple[torch.dtype, torch.dtype, torch.Size]] = []  # dtypes in and out, shape out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in OPERATORS:
            with torch._C._EnableTorchFunction(), NoPythonNumbers(self.host), self:  # else nothing inside would be seen
                return OPERATORS[func]._init_fn(*args, **kwargs)
        refuse_waits(func, args, kwargs, self.host)
        result = _widened(func, args, kwargs) if func in WIDENING else func(*args, **kwargs)
        self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if _is_view(func) or "empty" in func.name():
            return
        read = [t for t in tree_leaves((args, {k: v for k, v in kwargs.items() if k != "out"})) if _is_tensor(t)]
        if func is aten.copy_.default:
            read = read[1:]
        flops = 0
        if func in PRODUCTS:
            a, b = read[-2:]
            flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
            self.products.append((a.dtype, result.dtype, result.shape))
        written = [t for t in tree_leaves(result) if _is_tensor(t)]
        self.work.append(Work(func.name(), flops, sum(t.numel() * t.itemsize for t in (*read, *written))))

    def seconds(self, flop_rate: float, bandwidth: float) -> float:
        """By the roofline: each operation takes as long as the slower of its arithmetic and its memory."""
        return sum(work.seconds(flop_rate, bandwidth) for work in self.work)

    def kernels(self, real: ModuleType | None) -> SimpleNamespace:
        """The two functions of `stream_kl`, noted as one operation each; `real` None for meta tensors."""

        def divergences(streams: Streams, transform: Any, token_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
            given = [t for t in streams if t is not None]
            self.work.append(Work("divergences", 0, sum(t.numel() * t.itemsize for t in given)))
            if real is None:
                rows = streams.student.shape[0]
                return tuple(given[0].new_empty((rows, n), dtype=torch.float32) for n in (VALUES, STATISTICS))  # type: ignore[return-value]
            with _disable_current_modes():
                return real.divergences(streams, transform, token_weights)

        def logit_gradients(streams: Streams, *rest: Any, out: Tensor, **more: Any) -> None:
            moved = [t for t in (*streams, out, more.get("out_second")) if t is not None]
            self.work.append(Work("logit_gradients", 0, sum(t.numel() * t.itemsize for t in moved)))
            if real is not None:
                with _disable_current_modes():
                    real.logit_gradients(streams, *rest, out=out, **more)

        return SimpleNamespace(divergences=divergences, logit_gradients=logit_gradients)


@contextmanager
def gpu_loop(meta: bool = False, host: str = "cpu", **numbers: Any) -> Iterator[GpuLoop]:
    """Linear calls inside take the loop of a GPU; `numbers` replace those of its rule. `host`: the type of the device
    whose tensors the host may read, "" for none of them."""
    loop, load = GpuLoop(host), backends.load

    def kernels(operator: str, name: str) -> Any:
        found = load(operator, name)
        return loop.kernels(None if meta else found) if operator == "stream_kl" else found

    with (
        mock.patch.object(rule, "is_gpu", return_value=True),
        mock.patch.object(rule, "GPU", replace(rule.GPU, **numbers)),
        mock.patch.object(backends, "load", kernels),
        NoPythonNumbers(host),
        loop,
    ):
        yield loop


def refuse_waits(func: Any, args: Any, kwargs: Any, host: str) -> None:
    """Raise `HostWait` where the host would wait for a tensor that is not its own."""
    name = func.name().removeprefix("aten::").partition(".")[0]
    tensors = [t for t in tree_leaves((args, kwargs)) if _is_tensor(t)]
    device = {t.device.type for t in tensors if t.device.type != host}
    if name in READS and device and not (tensors[0].device.type == "cpu" and tensors[0].dtype == torch.float64):
        raise HostWait(f"{name} of a tensor of the device is read by the host")
    if name in ("index", "index_put", "index_put_"):
        for index in args[1]:
            if index is not None and (index.dtype == torch.bool or (device and index.device.type == host)):
                raise HostWait(f"{name} with a mask, or with indices of the host")
    copies = name in ("copy_", "_to_copy")
    to = kwargs.get("device")
    places = device | {t.device.type for t in tensors} | ({to.type} if to is not None else set())
    if copies and len(places) > 1 and not kwargs.get("non_blocking"):
        raise HostWait(f"{name} between host and device")


def _widened(func: Any, args: Any, kwargs: Any) -> Tensor:
    """a @ b of 16-bit matrices, summed and stored in float32."""
    out: Tensor = kwargs["out"]
    *start, a, b = [t for t in args if _is_tensor(t)]
    wide = a.to(out.dtype) @ b.to(out.dtype)
    return out.copy_(wide if not start else start[0] + wide)


def _is_view(func: Any) -> bool:
    alias = func._schema.returns[0].alias_info if func._schema.returns else None
    return alias is not None and not alias.is_write


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


@dataclass(frozen=True)
class Model:
    """The traffic of one call: what arithmetic says of a chunk loop, not what the code does."""

    students: int  # streams that are projected by the student's head
    teachers: int
    objectives: int
    tokens: int = 8192
    vocab: int = 151_936
    width: int = 2048
    teacher_width: int = 4096

    @property
    def floor_flops(self) -> int:
        """Of the products alone: a projection a stream, dH and dW an objective."""
        widths = self.students * self.width + self.teachers * self.teacher_width + 2 * self.objectives * self.width
        return 2 * self.tokens * self.vocab * widths

    def bytes(self, chunk: int) -> int:
        """With fp32 logits, bf16 gradients and an fp32 head gradient that every chunk but the first reads as well."""
        chunks = math.ceil(self.tokens / chunk)
        streams = self.students + self.teachers
        of_logits = self.tokens * self.vocab * (4 * 3 * streams + 2 * 3 * self.objectives)  # written once, read twice
        heads = chunks * self.vocab * 2 * (self.width * (1 + 1) + self.teacher_width)  # a projection each, dH
        head_gradients = self.objectives * self.vocab * self.width * 4 * (2 * chunks - 1)
        rounding = self.objectives * self.vocab * self.width * (4 + 2)
        return of_logits + heads + head_gradients + rounding
