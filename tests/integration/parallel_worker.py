"""One process of a parallel run: does every scenario, and writes what came of it.

    torchrun --standalone --nproc-per-node 2 -m tests.integration.parallel_worker FOLDER KIND...

FOLDER has the checkpoint of each kind in a folder of its name; what process R has found goes to FOLDER/KIND.R.jsonl, of
the first KIND.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from tests.integration.parallel_checks import APART, EVICTING, SHARED
from tests.integration.parallel_experts import EXPERTS
from tests.integration.parallel_scenarios import ASKED, MODES, SCENARIOS, Side, names, side_of

# A process that waits so long for the other waits for ever.
PATIENCE = timedelta(seconds=60)


class Notes:
    """What this process finds, line by line in a file; it learns whether the others have come through as well.

    Args:
        file: to write to.
        store: where the processes leave word.
        rank, size: of this process, and how many there are.
    """

    def __init__(self, file: TextIO, store: Any, rank: int, size: int) -> None:
        self.file, self.store, self.rank, self.size = file, store, rank, size
        self.stopped: str | None = None

    def note(self, name: str, do: Callable[[], Any], together: bool = True) -> None:
        """Does something and notes the result, or the error; after an error of one process nothing goes on."""
        began = time.perf_counter()
        said, found = "done", {"error": f"not run, after {self.stopped}"}
        if self.stopped is None:
            try:
                found = do()
            except Exception as error:
                said, found = f"{type(error).__name__}: {error}", {"error": traceback.format_exc()}
        self.file.write(json.dumps({"name": name, "found": found, "seconds": time.perf_counter() - began}) + "\n")
        self.file.flush()
        if not together or self.stopped is not None:
            return
        self.store.set(f"{name} {self.rank}", said)
        self.store.wait([f"{name} {rank}" for rank in range(self.size)], PATIENCE * 2)
        if len({self.store.get(f"{name} {rank}") for rank in range(self.size)}) > 1:
            self.stopped = name


def run(kind: str, folder: Path, notes: Notes) -> None:
    """Every scenario of one kind: spread, then each by one process alone."""
    own = folder / kind / str(notes.rank)
    own.mkdir()
    spread = AutoModelForCausalLM.from_pretrained(folder / kind, distributed_config=DistributedConfig(**ASKED[kind]))
    few = kind == "pp-sliding"
    for kv, mode in dict.fromkeys((name.kv, name.mode) for name in names(kind)):
        with side_of(spread, kv, mode, own) as side:
            for name in names(kind):
                if name[:2] == (kv, mode):
                    notes.note(f"{kind} {' '.join(name)}", lambda what=name.what: SCENARIOS[what](side))
    for what, scenario in () if few else [*SHARED.items(), *EVICTING.items(), *APART.items()]:
        notes.note(f"{kind} {what}", lambda scenario=scenario: scenario(spread, own))
    experts = EXPERTS if kind.endswith("mixtral") else {}
    for what, scenario in experts.items():
        notes.note(f"{kind} {what}", lambda scenario=scenario: scenario(spread, own))
    dist.barrier()
    plain = AutoModelForCausalLM.from_pretrained(folder / kind)
    work: list[tuple[str, Callable[[], Any]]] = []
    for name in names(kind):

        def alone(name: Any = name) -> Any:
            with side_of(plain, name.kv, name.mode, own) as side:
                return SCENARIOS[name.what](side)

        work.append((f"{kind} {' '.join(name)} alone", alone))
    for what in dict.fromkeys(name.what for name in names(kind)):
        work.append((f"{kind} {what} stock", lambda what=what: SCENARIOS[what](Side(plain, None, MODES[0], own))))
    for what, scenario in () if few else [*SHARED.items(), *EVICTING.items(), *list(APART.items())[:2]]:
        work.append((f"{kind} {what} alone", lambda scenario=scenario: scenario(plain, own)))
    if experts:  # in their order, by one process
        work.append((f"{kind} experts alone", lambda: {what: run(plain, own) for what, run in experts.items()}))
    for what, do in work[notes.rank :: notes.size]:
        notes.note(what, do, together=False)


def main(folder: Path, kinds: list[str]) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # transformers would wait two hours.
    dist.init_process_group("gloo", timeout=PATIENCE)
    with open(folder / f"{kinds[0]}.{rank}.jsonl", "w") as file:
        notes = Notes(file, dist.FileStore(str(folder / f"words-{kinds[0]}"), size), rank, size)
        for kind in kinds:
            run(kind, folder, notes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
