"""Benchmarks of `vgs_kernels`: one module per op, a correctness gate before every figure, JSON records, one report.

    python -m benchmarks.accuracy                 errors of every way to the gradients, close to convergence
    python -m benchmarks.linear_decomposed_kl     the products alone, plain torch, TRL and Liger
    python -m benchmarks.decomposed_kl            the logits-level kernel against the machine's copy bandwidth
    python -m benchmarks.sweep                    growth with tokens, vocabulary and width
    python -m benchmarks.report                   docs/benchmarks.md from benchmarks/records/*.json

Nothing imports the benchmarks.
"""
