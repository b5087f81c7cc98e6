"""The kernels under pytest-benchmark, to compare two commits of this repository (not with peers; see the modules).

    python -m pytest -o addopts= benchmarks/test_kernels.py --benchmark-autosave --benchmark-compare

Outside the default `testpaths`.
"""

from __future__ import annotations

import pytest

from benchmarks import decomposed_kl, inputs
from benchmarks.harness.cases import DTYPES
from benchmarks.methods import METHODS

pytest.importorskip("pytest_benchmark")
VOCAB = 32768


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_decomposed_kl(benchmark, dtype: str) -> None:  # type: ignore[no-untyped-def]
    streams = decomposed_kl.logits(64, VOCAB, DTYPES[dtype], "cpu")
    benchmark(decomposed_kl.loss_and_gradient, decomposed_kl.our_parts, streams)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_from_hidden_states(benchmark, dtype: str, method: str) -> None:  # type: ignore[no-untyped-def]
    streams = inputs.random_streams(64, inputs.random_heads(256, 256, VOCAB, DTYPES[dtype], "cpu"))
    benchmark(METHODS[method].ours, streams)
