"""`BenchError`: what cannot be measured, and what to ask for instead."""

from hfkv.policy.errors import RequestError


class BenchError(RequestError):
    """What was given, what is allowed and the remedy."""
