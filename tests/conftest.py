"""What every test shares: one thread a worker, and the count of skipped GPU tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from hfkv.kernels.dispatch import forget_choices
from hfkv.stores.offload import bus
from tests.lazy_bus import LazyBus
from tests.pairwise import leave_the_rest_for_slow

# What runs beside the tests does not decide what they run; a test that measures asks for it.
os.environ.setdefault("HFKV_MEASURE", "0")
torch.set_num_threads(int(os.environ.get("HFKV_TEST_THREADS", "1")))


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_the_rest_for_slow(items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-docs", action="store_true", help="write docs/reference/architectures.md from what the zoo shows"
    )


_rows: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collects the zoo's rows; with workers this runs in the process that started them."""
    if report.when == "call" and report.passed:
        _rows.extend(value for name, value in report.user_properties if name == "architecture")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--write-docs") and _rows and not hasattr(session.config, "workerinput"):
        from tests.model.test_zoo import write_docs

        write_docs(_rows)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _two_memories(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is offloaded on a CPU goes over a bus, as if its memory and the host's were two."""
    monkeypatch.setitem(bus.BUSES, "cpu", LazyBus)
    monkeypatch.setattr(bus, "_buses", {})


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine that has no C++ compiler."""
    monkeypatch.setenv("HFKV_NATIVE", "0")
    forget_choices()
    yield
    monkeypatch.undo()
    forget_choices()
