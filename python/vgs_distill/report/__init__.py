"""What a run logs and records, and the page of `vgs report` about it."""
