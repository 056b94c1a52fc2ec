"""Kernels run interpreted where there is no GPU, and compiled, as GPU tests, where there is one."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

IMPORTED = (
    "triton.experimental.gluon",  # the first launch would import it
    "hfkv.kernels.triton.append",
    "hfkv.kernels.triton.decode",
    "hfkv.kernels.experts.triton",
    "hfkv.kernels.experts.triton_combine",
    "hfkv.kernels.triton.latent",
    "hfkv.kernels.triton.prefill",
    "tests.kernels.triton_dots",
    "tests.kernels.triton_ranges",
)


def interpret() -> None:
    """Imports the kernels, and a Triton for them, as interpreted ones.

    Triton decides when it is imported, for itself and for what it decorates, and transformers may have imported it
    already. What others hold of that one stays as it was, and nothing imported later is interpreted.
    """
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        if not name.startswith("triton._C"):
            del sys.modules[name]
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        for name in IMPORTED:
            importlib.import_module(name)
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


if not torch.cuda.is_available():
    interpret()


def runs_kernels(path: Path) -> bool:
    """Whether the tests of a file launch Triton kernels."""
    return path.parent == Path(__file__).parent and path.name.startswith("test_triton_")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        for item in items:
            if runs_kernels(item.path) or item.path.name == "test_append.py":
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _empty_is_nan(request: pytest.FixtureRequest) -> Iterator[None]:
    """What kernels allocate and do not write to is NaN, or the largest integer."""
    if not runs_kernels(request.path):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
