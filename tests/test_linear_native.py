"""The compiled products of the linear calls against torch: products, transposition, choice of columns."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from vgs_kernels import LMHead, backend
from vgs_kernels.linear import linear_decomposed_kl

if backend._native_problem() is not None:
    pytest.skip(f"native backend: {backend._native_problem()}", allow_module_level=True)

operators = torch.ops.vgs_kernels_native
AVX512_BF16, AMX = 3, 4  # levels of them
ROOT = Path(__file__).resolve().parent.parent
COMPILER = next((path for path in map(shutil.which, ("c++", "g++", "clang++")) if path), None)
SHAPES = ((1, 2, 3), (3, 29, 5), (17, 430, 70), (64, 1000, 64), (70, 1113, 100), (65, 97, 1030), (33, 320, 544))
HALVES = (torch.bfloat16, torch.float16)
needs_matrix_unit = pytest.mark.skipif(operators.highest_cpu_level() < AMX, reason="needs a CPU with AMX for bfloat16")


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor) -> None:
    """Sums in float32 of terms of size 1, rounded to the dtype of the result."""
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(found.dtype).eps / 2 + 1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("rows", "vocab", "width"), SHAPES)
def test_products(rows: int, vocab: int, width: int, dtype: torch.dtype, level: int) -> None:
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    # Strided operands: the rows of a wider buffer.
    hidden = normal(rows, width + 1).to(dtype)[:, 1:]
    weight = normal(vocab, width + 2).to(dtype)[:, :width]
    bias = normal(vocab)
    library = hidden @ weight.t()
    exact_logits = hidden.double() @ weight.double().t()
    for out_dtype in {torch.float32, dtype}:
        for padding in (3, 0):  # rows that begin anywhere, and rows that fill cache lines where the vocabulary does
            logits = nan(rows, vocab + padding, dtype=out_dtype)
            for added in (None, bias):
                operators.logits(hidden, weight, added, logits[:, :vocab])
                assert_rounded_once(logits[:, :vocab], exact_logits + (0.0 if added is None else added))
            assert logits[:, vocab:].isnan().all()
        for gradient_dtype in {torch.float32, dtype}:
            gradient = normal(rows, vocab + 3).to(gradient_dtype)[:, :vocab]
            of_hidden = nan(rows, width + 2, dtype=out_dtype)
            operators.hidden_gradient(gradient, weight, of_hidden[:, :width])
            assert_rounded_once(of_hidden[:, :width], gradient.double() @ weight.double())
            assert of_hidden[:, width:].isnan().all()
            of_head, exact = nan(vocab, width + 2, dtype=out_dtype), gradient.double().t() @ hidden.double()
            operators.head_gradient(gradient, hidden, False, of_head[:, :width])
            assert_rounded_once(of_head[:, :width], exact)
            before = of_head[:, :width].double()
            operators.head_gradient(gradient, hidden, True, of_head[:, :width])
            assert_rounded_once(of_head[:, :width], before + exact)
            assert of_head[:, width:].isnan().all()
            check_remainder(gradient, hidden, of_head[:, :width])
    assert torch.equal(hidden @ weight.t(), library)  # what the library keeps in a matrix unit is still there


def check_remainder(gradient: torch.Tensor, hidden: torch.Tensor, out: torch.Tensor) -> None:
    """Many small products on top of a large sum: without the remainder each is lost in its rounding."""
    remainder = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype).fill_(math.nan)
    operators.head_gradient(gradient, hidden, False, out, remainder)
    for _ in range(40):
        operators.head_gradient(gradient * 2**-9, hidden, True, out, remainder)
    exact = (gradient.double() + 40 * (gradient * 2**-9).double()).t() @ hidden.double()
    torch.testing.assert_close(out.double() + remainder.double(), exact, rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(out.dtype).eps / 2 + 1e-4, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_sums_without_terms(dtype: torch.dtype, level: int) -> None:
    """Buffers that nobody wrote are not read."""
    bias = torch.randn(50)
    for added in (None, bias):
        logits = nan(3, 50)
        operators.logits(nan(3, 0, dtype=dtype), nan(50, 0, dtype=dtype), added, logits)
        assert torch.equal(logits, torch.zeros(3, 50) if added is None else bias.expand(3, -1))
    of_hidden, of_head = nan(3, 40, dtype=dtype), nan(50, 40, dtype=dtype)
    operators.hidden_gradient(nan(3, 0, dtype=dtype), nan(0, 40, dtype=dtype), of_hidden)
    assert not of_hidden.any()
    for accumulate in (False, True):
        operators.head_gradient(nan(0, 50, dtype=dtype), nan(0, 40, dtype=dtype), accumulate, of_head)
        assert not of_head.any()
    operators.logits(nan(0, 8, dtype=dtype), nan(50, 8, dtype=dtype), None, nan(0, 50))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_broken_row_stays_in_it(dtype: torch.dtype, level: int) -> None:
    """NaN and inf of one row or column reach what they belong to and nothing else."""
    hidden, weight = torch.randn(19, 40).to(dtype), torch.randn(131, 40).to(dtype)
    hidden[4, 3], weight[7, 5] = math.nan, math.inf
    logits = torch.empty(19, 131)
    operators.logits(hidden, weight, None, logits)
    broken = torch.zeros(19, 131, dtype=torch.bool)
    broken[4], broken[:, 7] = True, True
    assert torch.equal(~logits.isfinite(), broken)
    gradient, hidden = torch.randn(19, 131).to(dtype), torch.randn(19, 40).to(dtype)
    gradient[2, 130] = math.nan
    of_head = torch.empty(131, 40)
    operators.head_gradient(gradient, hidden, False, of_head)
    assert of_head.isnan().any(1).nonzero().flatten().tolist() == [130]


def run_on_emulated_tiles(folder: Path, csrc: Path) -> subprocess.CompletedProcess[str]:
    assert COMPILER is not None
    emulator, program = ROOT / "tests" / "amx_emulator", folder / "products"
    flags = ["-std=c++20", "-O2", "-w", "-mavx512f", "-mavx512bw", "-mavx512bf16", f"-I{csrc}", f"-I{emulator}"]
    command = [COMPILER, *flags, str(emulator / "products.cpp"), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return subprocess.run([str(program)], check=False, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.skipif(operators.highest_cpu_level() < AVX512_BF16, reason="needs a CPU with AVX512-BF16")
@pytest.mark.parametrize(
    ("correct", "planted"),
    [
        pytest.param("", "", id="as it is"),
        pytest.param("memcpy(&added, bias + v,", "memcpy(&added, bias,", id="the bias of other columns"),
        pytest.param("_tile_dpbf16ps(2, 5, 6);", "_tile_dpbf16ps(2, 4, 6);", id="a tile twice"),
        pytest.param("const Configuration ours;", "Configuration ours; ours.rows[3] = 8;", id="half a tile"),
    ],
)
def test_matrix_unit_over_emulated_tiles(correct: str, planted: str, tmp_path: Path) -> None:
    """The kernels of AMX on a CPU without it, and that mistakes in them are found."""
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    source = (csrc / "cpu" / "products_amx.cpp").read_text()
    assert correct in source
    (csrc / "cpu" / "products_amx.cpp").write_text(source.replace(correct, planted) if correct else source)
    result = run_on_emulated_tiles(tmp_path, csrc)
    assert (result.returncode == 0) == (not planted), result.stdout + result.stderr
    assert ("all cases passed" in result.stdout) == (not planted)


@needs_matrix_unit
@pytest.mark.parametrize(
    ("rows", "kept", "width"),
    [(1, 0, 32), (1, 1, 64), (5, 33, 1056), (33, 512, 320), (64, 1301, 2080), (99, 2999, 96), (128, 257, 1024)],
)
def test_matrix_unit_hidden_gradient(rows: int, kept: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    gradient = torch.randn(rows, kept + 3, generator=generator).bfloat16()[:, 1 : kept + 1]
    weight = torch.randn(3000, width + 3, generator=generator).bfloat16()[:, :width]
    columns = torch.randperm(3000, generator=generator)[:kept].sort().values
    dropped = torch.ones(3000, dtype=torch.bool).index_fill_(0, columns, False)
    weight[dropped] = math.nan  # and never read
    library = gradient @ weight[columns]
    out = nan(rows, width + 2, dtype=torch.bfloat16)
    operators.matrix_unit_hidden_gradient(gradient, weight, columns, out[:, :width])
    exact = gradient.double() @ weight[columns].double()
    torch.testing.assert_close(out[:, :width].double(), exact, rtol=2**-8, atol=1e-4)
    assert out[:, width:].isnan().all()
    assert torch.equal(gradient @ weight[columns], library)  # what the library keeps is still there
    with pytest.raises(RuntimeError, match="columns holds 3000"):
        operators.matrix_unit_hidden_gradient(gradient.new_zeros(rows, 1), weight, torch.tensor([3000]), out[:, :width])


@needs_matrix_unit
@pytest.mark.parametrize(
    ("rows", "kept", "width"), [(1, 0, 32), (1, 1, 64), (5, 33, 1056), (33, 512, 320), (64, 301, 2080), (600, 777, 96)]
)
def test_matrix_unit_head_gradient(rows: int, kept: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    gradient = torch.randn(rows, kept + 3, generator=generator).bfloat16()[:, 1 : kept + 1]
    hidden = torch.randn(rows, width + 1, generator=generator).bfloat16()[:, 1:]
    columns = torch.randperm(3000, generator=generator)[:kept].sort().values
    out = torch.randn(3000, width + 3, generator=generator).bfloat16()
    before = out.clone()
    operators.matrix_unit_head_gradient(gradient, hidden, columns, out[:, :width])
    exact = before.double()
    exact[columns, :width] += gradient.double().t() @ hidden.double()
    torch.testing.assert_close(out[columns].double(), exact[columns], rtol=2**-8, atol=1e-4)
    others = torch.ones(3000, dtype=torch.bool).index_fill_(0, columns, False)
    assert torch.equal(out[others], before[others])
    # A NaN of a column stays in it.
    if kept > 2:
        gradient[0, 1] = math.nan
        operators.matrix_unit_head_gradient(gradient, hidden, columns, out[:, :width])
        assert out[columns[1], :width].isnan().all()
        assert not out[columns[2:]].isnan().any()
    with pytest.raises(RuntimeError, match="columns holds -1"):
        operators.matrix_unit_head_gradient(gradient.new_zeros(rows, 1), hidden, torch.tensor([-1]), out[:, :width])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gather_columns(dtype: torch.dtype) -> None:
    matrix = torch.arange(7 * 3001).view(7, 3001).to(dtype)[:, 1:]
    for count in (0, 1, 1300):
        columns = torch.randperm(3000, generator=torch.Generator().manual_seed(count))[:count]
        out = nan(7, count + 2, dtype=dtype)
        operators.gather_columns(matrix, columns, out[:, :count])
        assert torch.equal(out[:, :count], matrix[:, columns])
        assert out[:, count:].isnan().all()
    with pytest.raises(RuntimeError, match="columns holds 3000, the vocabulary 3000"):
        operators.gather_columns(matrix, torch.tensor([3000]), nan(7, 1, dtype=dtype))
    with pytest.raises(RuntimeError, match="a column for each of columns"):
        operators.gather_columns(matrix, torch.tensor([0]), nan(7, 2, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_transpose(dtype: torch.dtype) -> None:
    for rows, columns in ((1, 1), (8, 8), (7, 65), (130, 33), (64, 4096)):
        matrix = torch.randn(rows, columns + 3).to(dtype)[:, :columns]
        out = nan(columns, rows + 2, dtype=dtype)
        operators.transpose(matrix, out[:, :rows])
        assert torch.equal(out[:, :rows], matrix.t())
        assert out[:, rows:].isnan().all()


def test_select_columns() -> None:
    squares = torch.randn(3001, generator=torch.Generator().manual_seed(0)).mul(8).exp()
    columns, exact = torch.empty((2, 3001), dtype=torch.int64), squares.double()
    for tolerance in (1e-6, 1e-3, 0.1, 0.9):
        pair = tolerance, 1.1 * tolerance
        counts = operators.select_columns(squares, *pair, columns)
        first = columns[0, : counts[0]]
        for limit, kept in zip(pair, (first, first[columns[1, : counts[1]]]), strict=True):
            assert (kept.diff() > 0).all()
            dropped = exact.clone()
            dropped[kept] = 0
            assert dropped.sum() <= limit**2 * exact.sum()
            best = int((exact.sort().values.cumsum(0) > limit**2 * exact.sum()).sum())
            assert best <= len(kept) <= best + 100  # a bin of the histogram is an eighth of an octave
    for huge in (math.nan, math.inf):
        squares[7] = huge
        assert operators.select_columns(squares, 1e-3, 0.1, columns) == (3001, 3001)  # nothing can be said to be small


def test_wrong_operands_raise() -> None:
    with pytest.raises(RuntimeError, match="do not fit"):
        operators.logits(torch.ones(2, 3), torch.ones(5, 4), None, torch.ones(2, 5))
    with pytest.raises(RuntimeError, match="bias must be contiguous float32 with an entry for each row of weight"):
        operators.logits(torch.ones(2, 4), torch.ones(5, 4), torch.ones(4), torch.ones(2, 5))
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16 matrices"):
        operators.head_gradient(torch.ones(2, 3).double(), torch.ones(2, 4), False, torch.ones(3, 4))
    with pytest.raises(RuntimeError, match="remainder must have the shape, the strides and the dtype of out"):
        operators.head_gradient(torch.ones(2, 3), torch.ones(2, 4), False, torch.ones(3, 4), torch.ones(3, 5)[:, :4])
    with pytest.raises(RuntimeError, match="transposed shape"):
        operators.transpose(torch.ones(2, 3), torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_results(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, teacher, masked = torch.randn(3, 9, 64, generator=generator).to(dtype).unbind()
    weight, teacher_weight = torch.randn(2, 9001, 64, generator=generator).to(dtype).unbind()
    hidden.requires_grad_()
    weight.requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            result = linear_decomposed_kl(
                hidden, LMHead(weight), teacher, LMHead(teacher_weight), masked, decomposition="teacher_prior",
                objective=(1.0, 0.5, 0.0), backend="native", max_chunk_bytes=4 * 3 * 9001 * dtype.itemsize,
            )  # fmt: skip
            assert result.objective is not None
            found.append([result.objective, *torch.autograd.grad(result.objective, [hidden, weight])])
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(b, c)
