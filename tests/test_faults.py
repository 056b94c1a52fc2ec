"""The faults that can be planted: each still has its place in the code, and every room has one."""

from __future__ import annotations

import pytest

from tests.architecture import MAY_IMPORT
from tests.faults.fault import Fault
from tests.faults.planted import FAULTS
from tests.faults.planting import ROOT, planted_text

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_code_that_a_fault_changes_is_there_once(fault: Fault) -> None:
    planted = planted_text(fault)  # raises where its place is not there, or is there twice
    if fault.file.endswith(".py"):
        compile(planted, fault.file, "exec")
    assert fault.new != fault.old
    assert all((ROOT / "tests" / file).is_file() for file in fault.tests)


def test_every_room_has_a_fault() -> None:
    rooms = {fault.file.removeprefix("hfkv/").partition("/")[0] for fault in FAULTS}
    assert rooms == set(MAY_IMPORT) - {"tiny_lm"}
