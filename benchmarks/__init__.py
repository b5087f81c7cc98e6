"""Benchmarks of `vgs_kernels`: one module per op, a correctness gate before every figure, JSON records, one report.

    python -m benchmarks.linear_decomposed_kl     the must-show table
    python -m benchmarks.decomposed_kl            the logits-level kernel against the machine's copy bandwidth
    python -m benchmarks.sweep                    growth with tokens, vocabulary and width
    python -m benchmarks.report                   docs/benchmarks.md from benchmarks/records/*.json

Layer: top of everything. Imports the public names of `vgs_kernels` only; nothing imports the benchmarks.
"""
