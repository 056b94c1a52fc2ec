"""Faults planted in copies of the library, to see that tests find them: ``python -m tests.faults``."""
