"""What a student, its teacher and some prompts say before any training: the measurement, a recommendation, a page."""
