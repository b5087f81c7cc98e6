"""What a run records, and the page of `vgs report` about it. All but `recording.py` and `timing.py` know files only."""
