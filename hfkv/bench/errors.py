"""`BenchError`: what cannot be measured, and what to ask for instead."""


class BenchError(ValueError):
    """What was given, what is allowed and the remedy."""
