"""Tensor, pipeline and expert parallelism of transformers' own, over two processes: the tokens of a single one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from filelock import FileLock

from tests.integration.parallel_checks import EVICTING, SHARED
from tests.integration.parallel_scenarios import ASKED, KV, NEW_TOKENS, SCENARIOS, Name, model_of, names

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# What one launch loads: the kinds that are spread alike.
LAUNCHES = (("tp-llama",), ("tp-mixtral",), ("pp-llama", "pp-sliding"), ("ep-mixtral",))
KINDS = [kind for kinds in LAUNCHES for kind in kinds]
WHOLE = [kind for kind in KINDS if kind != "pp-sliding"]
TIMEOUT = 300  # seconds, for what takes about 60


def shares_heads(kind: str) -> bool:
    """Whether each process has some of the kv heads; transformers 5.17 shares the experts or the heads."""
    return "tp_size" in ASKED[kind] and "enable_expert_parallel" not in ASKED[kind]


class Run:
    """What the processes of one launch have found."""

    def __init__(self, log: str, ranks: list[dict[str, Any]]) -> None:
        self.log, self.ranks = log, ranks

    def of(self, name: str) -> list[dict[str, Any]]:
        """Of a scenario, what each process has found."""
        found = [rank.get(name) for rank in self.ranks]
        for rank, one in enumerate(found):
            assert one is not None, f"process {rank} has not come to {name!r}:\n{self.log}"
            assert "error" not in one, f"process {rank}, {name!r}:\n{one['error']}"
        return found  # type: ignore[return-value]

    def single(self, name: str) -> dict[str, Any]:
        """What the process found that did it alone."""
        (found,) = [rank[name] for rank in self.ranks if name in rank] or [{"error": self.log}]
        assert "error" not in found, found["error"]
        return found


def launch(kinds: tuple[str, ...], folder: Path) -> None:
    """Runs every scenario of `kinds` in two processes, and ends them where they hang."""
    for kind in kinds:
        model_of(kind).save_pretrained(folder / kind)
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = ["tests.integration.parallel_worker", str(folder), *kinds]
    with open(folder / f"{kinds[0]}.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "-m", *worker],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            log.write(f"\nended after {TIMEOUT} seconds\n")
        finally:
            # Each worker has a session of its own.
            running = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            for child in running:
                child.kill()
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def launched(tmp_path_factory):
    """Runs a kind once, whichever of pytest's workers comes to it first."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "parallel"
    folder.mkdir(exist_ok=True)
    runs: dict[str, Run] = {}

    def run_of(kind: str) -> Run:
        if kind not in runs:
            kinds = next(kinds for kinds in LAUNCHES if kind in kinds)
            first, log = kinds[0], folder / f"{kinds[0]}.log"
            with FileLock(folder / f"{first}.lock"):
                if not log.exists():
                    launch(kinds, folder)
            found = []
            for file in (folder / f"{first}.0.jsonl", folder / f"{first}.1.jsonl"):
                lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
                found.append({line["name"]: line["found"] for line in lines})
            runs.update(dict.fromkeys(kinds, Run(log.read_text()[-4000:], found)))
        return runs[kind]

    return run_of


def each(what: Any) -> Any:
    """Every kind with every scenario that `what` gives it, with readable names."""
    pairs = [(kind, name) for kind in KINDS for name in what(kind)]
    return pytest.mark.parametrize(
        ("kind", "name"),
        pairs,
        ids=[f"{kind}-{'-'.join(name) if isinstance(name, Name) else name}" for kind, name in pairs],
    )


@each(names)
def test_every_process_has_the_tokens_of_a_single_one(launched, kind, name):
    run, title = launched(kind), f"{kind} {' '.join(name)}"
    alone = run.single(f"{title} alone")
    assert run.of(title) == [alone, alone]


@each(lambda kind: [name for name in names(kind) if name.kv in ("none", "paged")])
def test_lossless_caches_have_the_tokens_of_transformers_own(launched, kind, name):
    run = launched(kind)
    stock = run.single(f"{kind} {name.what} stock")
    assert run.of(f"{kind} {' '.join(name)}") == [stock, stock]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.endswith("mixtral")])
def test_experts_are_those_of_a_single_process(launched, kind):
    run = launched(kind)
    alone = run.single(f"{kind} experts alone")
    stock = torch.tensor(alone["experts stock"]["logits"])
    for what in ("experts stock", "experts auto", "experts int8"):
        found = run.of(f"{kind} {what}")
        logits = torch.tensor(alone[what]["logits"])
        for one in found:
            # The matrices of a tensor-parallel process have fewer inputs, and so other scales in int8.
            bound = 0.2 if what == "experts int8" and shares_heads(kind) and kind == "tp-mixtral" else 1e-4
            assert ((torch.tensor(one["logits"]) - logits).norm() / stock.norm()).item() <= bound
            if bound == 1e-4:
                assert one["tokens"] == alone[what]["tokens"]
    assert run.of(f"{kind} experts auto")[0]["tokens"] == alone["experts stock"]["tokens"]
    # A packed matrix knows nothing of processes; int8 is made of what each has.
    assert [one["forms"] for one in run.of(f"{kind} experts auto")] == [["plain"]] * 2
    assert [one["forms"] for one in run.of(f"{kind} experts int8")] == [["int8"]] * 2
    assert all(one["ratio"] < 0.35 for one in run.of(f"{kind} experts int8"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_do_not_repeat_themselves(launched, kind):
    new = [row[-NEW_TOKENS:] for row in launched(kind).single(f"{kind} padded stock")["tokens"]]
    assert all(len(set(row)) > NEW_TOKENS // 2 for row in new)
    assert new[0] != new[1]


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("kv", ["int8", "window"])
def test_lossy_caches_lose_something(launched, kind, kv):
    told = [launched(kind).single(f"{kind} {kv} patched {what} alone") for what in SCENARIOS]
    assert told != [launched(kind).single(f"{kind} {what} stock") for what in SCENARIOS]


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("name", SHARED)
def test_calls_share_as_in_a_single_process(launched, kind, name):
    run = launched(kind)
    alone = run.single(f"{kind} {name} alone")
    assert run.of(f"{kind} {name}") == [alone, alone]
    if name.startswith("reuse"):
        assert alone["hits"] >= 5
        assert alone["reused"][-1] > 50
        assert alone["evictions"] == 0


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("name", EVICTING)
def test_pools_that_forget_different_pages_share_alike(launched, kind, name):
    run = launched(kind)
    first, second = run.of(f"{kind} {name}")
    assert first["tokens"] == second["tokens"] == run.single(f"{kind} {name} alone")["tokens"]
    assert (first["reused"], first["hits"]) == (second["reused"], second["hits"])
    assert first["hits"] > 0
    assert min(first["evictions"], second["evictions"]) > 0
    if kind == "pp-llama":  # a page of one of its layers has half the bytes of one of the two others'
        assert first["evictions"] != second["evictions"]


@pytest.mark.parametrize("kind", WHOLE)
def test_processes_hold_their_part_of_the_bytes(launched, kind):
    run = launched(kind)
    whole = run.single(f"{kind} memory alone")["held_bytes"]
    parts = [found["held_bytes"] for found in run.of(f"{kind} memory")]
    layers = {"pp-llama": (1, 2)}.get(kind, (1, 1) if shares_heads(kind) else (1,))
    for kv in KV:
        assert [part[kv] for part in parts] == [
            whole[kv] * layers[rank % len(layers)] // sum(layers) for rank in (0, 1)
        ]


@pytest.mark.parametrize("kind", WHOLE)
def test_a_learned_prefix_goes_into_the_layers_of_a_stage_and_not_into_some_heads(launched, kind):
    run = launched(kind)
    alone, found = run.single(f"{kind} learned prefix alone"), run.of(f"{kind} learned prefix")
    if not shares_heads(kind):
        assert found == [alone, alone]
        assert alone["tokens"] != run.single(f"{kind} padded stock")["tokens"]
    else:
        assert all("keys and values of all kv heads" in one["said"] for one in found)


@pytest.mark.parametrize("kind", WHOLE)
def test_a_refusal_of_one_process_is_one_of_all(launched, kind):
    first, second = launched(kind).of(f"{kind} one refuses")
    assert "was filled by other weights" in first["said"]
    assert "another process of this model refuses" in second["said"]
    assert first["same"]
    assert second["same"]


@pytest.mark.parametrize("kind", WHOLE)
def test_the_file_of_another_process_is_refused(launched, kind):
    for found in launched(kind).of(f"{kind} others' file"):
        assert "was filled by other weights" in found["said"]


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("how", ["", "patched "])
def test_windows_that_cannot_be_right_are_refused_everywhere(launched, kind, how):
    for found in launched(kind).of(f"{kind} refusals"):
        heads, moved = found[f"{how}global_heads"], found[f"{how}sink_positions"]
        assert ("only some of them; use global_layers" if shares_heads(kind) else "nothing") in heads
        assert ("the stages of a pipeline" if kind == "pp-llama" else "nothing") in moved
        assert ('use sink_positions="absolute"' in moved) == (kind == "pp-llama")
