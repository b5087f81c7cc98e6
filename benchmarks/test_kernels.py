"""The kernels under pytest-benchmark, to compare two commits of this repository (not with peers; see the modules).

    python -m pytest -o addopts= benchmarks/test_kernels.py --benchmark-autosave --benchmark-compare

Outside the default `testpaths`.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import decomposed_kl, inputs, linear_gate, peers
from benchmarks.harness.cases import DTYPES

pytest.importorskip("pytest_benchmark")
VOCAB = 32768


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_decomposed_kl(benchmark, dtype: str) -> None:  # type: ignore[no-untyped-def]
    streams = decomposed_kl.logits(64, VOCAB, DTYPES[dtype], "cpu")
    benchmark(decomposed_kl.loss_and_gradient, decomposed_kl.our_parts, streams)


@pytest.mark.parametrize("decomposition", inputs.DECOMPOSITIONS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_linear_decomposed_kl(benchmark, dtype: str, decomposition: str) -> None:  # type: ignore[no-untyped-def]
    streams = inputs.random_streams(64, inputs.random_heads(256, 256, VOCAB, DTYPES[dtype], "cpu"))
    weights = torch.tensor(linear_gate.STEERING_WEIGHTS)
    benchmark(peers.ours_objective, decomposition, streams, weights)
