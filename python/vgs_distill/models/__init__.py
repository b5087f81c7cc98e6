"""Models as a run needs them: where they come from, their parts, and the teacher's place."""
