"""The CUDA kernels of `gradient_gramian` and `combine_gradients` without a GPU.

They run as C++ over `cuda_emulator/cuda_emulator.h`, plain and with sanitizers, and mistakes planted in copies of them
must be found. nvcc compiles them for four architectures, and their registers, stack and loads are read from the result.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = Path(__file__).resolve().parent / "cuda_emulator"
COMPILER = next((path for path in map(shutil.which, ("c++", "g++", "clang++")) if path), None)
NVCC = shutil.which("nvcc")
ARCHITECTURES = ("80", "90", "100", "120")

PLAIN = ["-O2"]
SANITIZED = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="the emulator needs a C++ compiler on the PATH")


def run_emulated(folder: Path, flags: list[str], csrc: Path = ROOT / "csrc") -> subprocess.CompletedProcess[str]:
    assert COMPILER is not None
    program = folder / "steering_kernels"
    # Three tensors to a table, so that a few tensors already take several launches.
    options = ["-std=c++20", *flags, "-w", "-DVGS_TABLE_TENSORS=3", f"-I{csrc}", f"-I{EMULATOR}"]
    subprocess.run(
        [COMPILER, *options, str(EMULATOR / "steering_kernels.cpp"), "-o", str(program)],
        check=True,
        capture_output=True,
        text=True,
    )
    return subprocess.run([str(program)], check=False, capture_output=True, text=True, timeout=120)


@needs_compiler
@pytest.mark.parametrize("flags", [PLAIN, SANITIZED], ids=["plain", "sanitized"])
def test_kernels_agree_with_fp64_under_every_schedule(tmp_path: Path, flags: list[str]) -> None:
    result = run_emulated(tmp_path, flags)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all cases passed" in result.stdout


BARRIER = "  __syncthreads();  // without it"


@needs_compiler
@pytest.mark.parametrize(
    ("file", "correct", "planted", "flags", "message"),
    [
        pytest.param(
            "gradient_gramian.cuh", BARRIER, BARRIER.replace("__syncthreads();", ""), PLAIN, "race on shared memory",
            id="missing barrier",
        ),
        pytest.param(
            "gradient_gramian.cuh", BARRIER, "  if (warp != 3) __syncthreads();  //", PLAIN, "have left without it",
            id="divergent barrier",
        ),
        pytest.param(
            "gradient_gramian.cuh", "sums[i] = warp_sum(sum);", "if (lane < 16) sums[i] = warp_sum(sum);", PLAIN,
            "the mask names a lane that has left", id="divergent shuffle",
        ),
        pytest.param(
            "gradient_gramian.cuh", "Shared<double, 3 * kWarps>", "Shared<double, 3 * kWarps - 1>", PLAIN,
            "shared memory out of bounds", id="shared memory out of bounds",
        ),
        pytest.param(
            "gradient_lists.cuh", "(work.end - first) / kGroup", "(work.end - first + kGroup - 1) / kGroup", SANITIZED,
            "heap-buffer-overflow", id="global memory out of bounds",
        ),
        pytest.param(
            "gradient_lists.cuh", "% 16 == 0", "% 4 == 0", SANITIZED, "misaligned address", id="misaligned vector load",
        ),
    ],
)  # fmt: skip
def test_a_planted_mistake_is_found(
    tmp_path: Path, file: str, correct: str, planted: str, flags: list[str], message: str
) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    source = (csrc / "cuda" / file).read_text()
    assert source.count(correct) == 1, f"{file} changed: plant the mistake anew"
    (csrc / "cuda" / file).write_text(source.replace(correct, planted))
    result = run_emulated(tmp_path, flags, csrc)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr


# Registers a thread may use. With 32, four blocks of 512 threads fill the 65536 registers of a multiprocessor; 64 still
# keeps two blocks there, 1024 threads with a 128-bit load or more in flight each. Float kernels get 42: three blocks,
# all 1536 threads of an sm_120 multiprocessor.
REGISTERS = {"float": 42, "double": 64}
INSTANCES = """
#include "cuda/combine_gradients.cuh"
#include "cuda/gradient_gramian.cuh"
namespace vgs::cuda {
template __global__ void chunk_products<float>(const __grid_constant__ Table, double*);
template __global__ void chunk_products<double>(const __grid_constant__ Table, double*);
template __global__ void sum_of_chunks<float>(const double*, int64_t, float*);
template __global__ void sum_of_chunks<double>(const double*, int64_t, double*);
template __global__ void combine_chunks<float>(const __grid_constant__ Table, const float*);
template __global__ void combine_chunks<double>(const __grid_constant__ Table, const double*);
}
"""


def cuobjdump() -> str | None:
    """From the PATH, or the copy that comes with Triton."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton")
        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Resource usage and SASS of the kernels, for all architectures."""
    if NVCC is None:
        pytest.skip("nvcc is not on the PATH")
    disassembler = cuobjdump()
    if disassembler is None:
        pytest.skip("cuobjdump is neither on the PATH nor in Triton")
    folder = tmp_path_factory.mktemp("nvcc")
    (folder / "instances.cu").write_text(INSTANCES)
    targets = [flag for a in ARCHITECTURES for flag in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    subprocess.run(
        [NVCC, "-c", "-std=c++20", "-O3", *targets, f"-I{ROOT / 'csrc'}", "instances.cu", "-o", "instances.o"],
        check=True,
        cwd=folder,
    )
    return {
        option: subprocess.run(
            [disassembler, f"-{option}", "instances.o"], check=True, capture_output=True, text=True, cwd=folder
        ).stdout
        for option in ("res-usage", "sass")
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_do_not_spill_and_stay_within_their_registers(compiled: dict[str, str], architecture: str) -> None:
    usage = compiled["res-usage"].split(f"arch = sm_{architecture}\n")[1].split("Fatbin")[0]
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert len(kernels) == 6
    for name, registers, stack, local in kernels:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(registers) <= REGISTERS["double" if "IdE" in name else "float"], name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_memory_is_read_and_written_128_bits_at_a_time(compiled: dict[str, str], architecture: str) -> None:
    code = compiled["sass"].split(f"arch = sm_{architecture}\n")[1].split("Fatbin")[0]
    for kernel in ("chunk_products", "combine_chunks"):
        bodies = [body for body in code.split("Function : ")[1:] if kernel in body.splitlines()[0]]
        assert len(bodies) == 2
        for body in bodies:
            # Both gradients: one load of bf16, one of fp16, two of fp32, four of fp64.
            assert len(re.findall(r"LDG\.E\S*\.128", body)) >= 2 * (1 + 1 + 2 + 4)
            assert not re.search(r"\b(LDL|STL)\b", body), "a register is spilled"
            if kernel == "combine_chunks":
                assert re.search(r"STG\.E\S*\.128", body)
