"""Benchmarks of `vgs_kernels`: one module per op, a correctness gate before every figure, JSON records, one report.

    python -m benchmarks.accuracy                 errors of every way to the gradients, close to convergence
    python -m benchmarks.linear_reverse_kl        reverse KL from hidden states, against TRL, Liger and plain torch
    python -m benchmarks.linear_decomposed_kl     every method from hidden states, beside its products alone
    python -m benchmarks.decomposed_kl            the logits-level kernel against the machine's copy bandwidth
    python -m benchmarks.sweep                    growth with tokens, vocabulary and width
    python -m benchmarks.report                   docs/benchmarks.md from benchmarks/records/*.json

Nothing imports the benchmarks.
"""
