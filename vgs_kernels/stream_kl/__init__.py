"""Reverse KL of one student stream against constant streams, on logits: `reference.py` specifies, `op.py` registers."""
