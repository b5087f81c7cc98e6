"""What a run reads: rows, the evidence in them, and what model families make of it."""
