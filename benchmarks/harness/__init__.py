"""What the benchmarks share, a subject a file: a figure's way from `cases` through `timing` to `records`.

cases      a fresh process for every dtype and number of threads; what is on record is not measured again
gates      errors against fp64, and what they may be; no figure without a green gate
runs       in how many runs of tokens a linear call went through its products
timing     calls in turns, so that a slow spell of the machine meets all of them
memory     peak memory of a call above its inputs and results
machine    hardware, versions, commit; the fingerprint of the measured code
records    one JSON file a case; ratios, and targets with the reason for each
tables     a record as text and as markdown
plots      lines as SVG
"""
