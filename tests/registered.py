"""A backend of a test's own, for as long as the test needs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

from hfkv.kernels.backend import Backend
from hfkv.kernels.dispatch import BACKENDS, forget_choices, register_backend

Own = TypeVar("Own", bound=Backend)


@contextlib.contextmanager
def registered(backend: Own) -> Iterator[Own]:
    """Registers a backend, and takes it back."""
    register_backend(backend)
    try:
        yield backend
    finally:
        BACKENDS.remove(backend)
        forget_choices()
