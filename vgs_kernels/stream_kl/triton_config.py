"""Launch heuristics of the Triton kernels of `stream_kl`: sizes, each with its reason.

Nobody has run these kernels on a GPU yet. The reasons are arithmetic (bytes in flight, instructions per element) and
what `docs/compile_report.md` shows (registers), not timings; autotuning exists to let a GPU overrule them.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cache

import torch

LOAD_BYTES = 16  # the widest load of every supported GPU is 128 bits per thread
VISUAL = 2  # the kind with the most state
AUTOTUNE_VARIABLE = "VGS_KERNELS_TRITON_AUTOTUNE"  # "1": time CANDIDATE_WARPS at the first call of each shape


@dataclass(frozen=True)
class Geometry:
    """How one program (thread block) walks a row.

    A tile is `loads x lanes x vector` consecutive columns: each thread takes `loads` pieces of `vector` elements, so
    that every sum along a tile stays inside one thread until the row ends.
    """

    warps: int
    lanes: int  # threads of the program
    vector: int  # elements of one load: 128 bits, or one element where rows start anywhere
    loads: int  # loads per thread, stream and tile

    @property
    def tile(self) -> int:
        return self.loads * self.lanes * self.vector


@dataclass(frozen=True)
class Heuristics:
    """The free numbers of the launch; one instance per kind of device."""

    warps: int
    elements_per_lane: int
    programs_per_processor: int
    waves: int
    minimum_tiles: int
    visual_forward: tuple[tuple[str, int], ...] = ()  # further options of the launch with the most state


# warps=4: 128 threads read 2 KiB per stream and tile; a program this small leaves room for many others, whose loads
#   overlap its arithmetic (there is no barrier inside a row, so programs never wait for each other).
# elements_per_lane=8: one 128-bit load of 16-bit logits, two of fp32. Each tile costs some 25 instructions per thread
#   for the new maxima whatever it holds; 8 elements bring that under a quarter of the work. 16 would double the live
#   registers and halve the threads that hide the latency of memory.
# programs_per_processor=6: what about 80 registers per thread allow on a processor with 64 Ki registers; the compile
#   report shows 48-80 for two and three streams, and 106-163 for four, which fits 3. At 32 bytes in flight per thread
#   and stream (float32 logits) that is 48 KiB per processor, above the 20-45 KiB that bandwidth x latency asks for on
#   H100 and B200 (data sheets: 3.35 and 8 TB/s over 132 and 148 processors; 0.8 us assumed).
# waves=4: programs differ little in length, so a last partial wave idles at most a fifth of the launch.
# minimum_tiles=8: a program ends in some 20 reductions across its warps, about the time of one or two tiles; eight keep
#   that a small part.
NVIDIA = Heuristics(warps=4, elements_per_lane=8, programs_per_processor=6, waves=4, minimum_tiles=8)
# AMD warps ("wavefronts") have 64 lanes: two of them make the same 128-thread program.
# waves_per_eu=3: room for three wavefronts a SIMD, at most 168 registers, for the kind with the most state. With four
#   it spills where a soft cap or a guard needs more.
AMD = Heuristics(
    warps=2, elements_per_lane=8, programs_per_processor=6, waves=4, minimum_tiles=8,
    visual_forward=(("waves_per_eu", 3),),
)  # fmt: skip
# No cap on registers on NVIDIA: the compiler takes a cap as a target. Capped at 128, a gradient that needs 75 took 106.
# The interpreter runs programs one after another: few large ones are fastest, and splitting is chosen by the tests.
INTERPRETER = Heuristics(warps=4, elements_per_lane=8, programs_per_processor=1, waves=1, minimum_tiles=1)

# What autotuning tries. With 8, a program of four streams takes half of a processor's registers: one fits, not three.
CANDIDATE_WARPS = (1, 2, 4)


@dataclass(frozen=True)
class Device:
    """What the heuristics need to know of a device."""

    heuristics: Heuristics
    processors: int
    warp_size: int


@cache
def describe_device(device: torch.device) -> Device:
    """Properties are read once per device; none of this waits for the GPU."""
    if device.type == "cpu":
        return Device(INTERPRETER, processors=1, warp_size=32)
    properties = torch.cuda.get_device_properties(device)
    warp_size = getattr(properties, "warp_size", 32)
    return Device(AMD if torch.version.hip else NVIDIA, properties.multi_processor_count, warp_size)


def geometry(device: Device, itemsize: int, warps: int | None = None, aligned: bool = True) -> Geometry:
    """The tile of a program, for logits of `itemsize` bytes.

    Rows that do not start at multiples of a full-width load are read one element at a time, neighbours by neighbouring
    threads: a thread that took a whole vector in pieces would make every load of a warp touch eight times the lines.
    Nothing lies between, so that every variant is one that the compile gate has read; real vocabularies are aligned.
    """
    warps = device.heuristics.warps if warps is None else warps
    vector = LOAD_BYTES // itemsize if aligned else 1
    return Geometry(
        warps=warps,
        lanes=warps * device.warp_size,
        vector=vector,
        loads=max(1, device.heuristics.elements_per_lane // vector),
    )


def forward_options(device: Device, shape: Geometry, kind: int) -> dict[str, int]:
    """Options of the launch of `divergences_kernel`."""
    further = device.heuristics.visual_forward if kind == VISUAL else ()
    return {"num_warps": shape.warps, **dict(further)}


def split_row(device: Device, shape: Geometry, tokens: int, columns: int) -> tuple[int, int]:
    """Return (programs per row, tiles per program): one program where the rows alone fill the device for `waves`."""
    tiles = max(1, math.ceil(columns / shape.tile))
    heuristics = device.heuristics
    wanted = device.processors * heuristics.programs_per_processor * heuristics.waves
    splits = min(math.ceil(wanted / max(tokens, 1)), tiles // heuristics.minimum_tiles)
    tiles_per_program = math.ceil(tiles / max(1, splits))
    return math.ceil(tiles / tiles_per_program), tiles_per_program


def autotune_requested() -> bool:
    """Off unless the variable says otherwise: timing at the first call of each shape surprises whoever waits for it."""
    return os.environ.get(AUTOTUNE_VARIABLE) == "1"
