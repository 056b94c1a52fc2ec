"""The self-test of `hfkv doctor` in several processes: ``python selftest.py DEVICE [JSON]``.

Compiling a hundred kernels is most of it, and one core's work. Each outcome is printed as it comes; exit code 1 where
a kernel is wrong.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch

from hfkv.kernels.selftest.suite import Check, plan

MOST_PROCESSES = 12


def run(device: str, index: int) -> Check:
    return plan(torch.device(device), torch.bfloat16)[index].run()


def main(device: str, path: str | None = None) -> int:
    count = len(plan(torch.device(device), torch.bfloat16))
    processes = min(MOST_PROCESSES, os.cpu_count() or 1)
    checks = []
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run, device, index) for index in range(count)]):
            check = done.result()
            checks.append(check)
            what = f"{check.what} of {check.num_tokens}, {check.codec}, {check.store}, {check.setting}"
            error = "" if check.error is None else f" error {check.error:.1e} of {check.allowed:.1e}"
            print(f"{check.outcome}: {what}{error} {check.note or ''}".rstrip(), flush=True)
    if path is not None:
        Path(path).write_text(json.dumps([asdict(check) for check in checks], indent=1))
    wrong = sum(check.is_failure for check in checks)
    print(f"{count} checks, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
