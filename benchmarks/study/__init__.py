"""The study: which method, which gamma, which guard; `python -m benchmarks.study`.

`plan.py` says what is run, `runs.py` runs it in worker processes and keeps one JSON line per run, `statistics.py` holds
the intervals, `report.py` writes docs/study.md from the lines. Tasks, models and distillation are those of the demo.
"""
