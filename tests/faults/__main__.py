"""``python -m tests.faults [NAME ...]``: plants each fault in a copy and prints which test finds it first."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.faults.fault import Fault
from tests.faults.planted import FAULTS
from tests.faults.planting import first_to_find, plant

NOTHING = "-"


def found_by(fault: Fault) -> tuple[str, str]:
    """The first test of the default tier and, where that has none, of the slow one that finds a fault."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / "copy"
        plant(fault, folder)
        by_default = first_to_find(fault, folder, "default")
        by_slow = None if by_default else first_to_find(fault, folder, "slow")
    return by_default or NOTHING, by_slow or NOTHING


def main(names: Sequence[str]) -> int:
    """Prints a row for each fault whose name has one of the words given, or for all; 1 where some are not found."""
    chosen = [fault for fault in FAULTS if not names or any(name in fault.name for name in names)]
    if not chosen:
        raise SystemExit(f"no fault is named {' or '.join(names)}; there are: {'; '.join(f.name for f in FAULTS)}")
    print("fault | file | found by default | found by slow", flush=True)
    missed = 0
    for fault in chosen:
        by_default, by_slow = found_by(fault)
        missed += by_default == by_slow == NOTHING
        print(f"{fault.name} | {fault.file} | {by_default} | {by_slow}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults found")
    return int(missed > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="words in the names of faults; all without one")
    raise SystemExit(main(parser.parse_args().names))
