"""The HTML report of a run, from what `vgs_distill.recording` wrote. Knows files, not the engine; needs no torch."""
