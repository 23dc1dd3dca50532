"""What holds unless something else is asked for."""

DEFAULT_CRITERION = "entropy-square"
"""How neurons are scored: first at 20% in `benchmarks/criteria.py`."""
REPAIR_STEPS = 300
