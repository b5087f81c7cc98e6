"""From the two parts of a loss to one gradient."""
