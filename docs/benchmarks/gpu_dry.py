"""Whether `gpu.sh` would run: ``bash gpu.sh --dry`` hands over its commands, a line each: part, name, seconds, command.

Without a GPU: every command goes through the parser of its program, every suite is made ready on one of 139 GiB up to
where it would allocate, and what it then holds at once is worked out by the checks and plans of hfkv itself. Every
target of targets-gpu.toml has to be measured by some command, and the first two parts have to end within four minutes.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import typer

from hfkv.bench import Setting, checks, contenders, models, runner, suite
from hfkv.bench.contenders import GRAPHS
from hfkv.bench.setting import BenchError
from hfkv.bench.suites import mla, moe
from hfkv.cli.bench import command as bench_command
from hfkv.cli.bench import setting as bench_setting
from hfkv.cli.commands import app
from hfkv.cli.doctor import command as doctor_command
from hfkv.models.shapes import skeleton
from hfkv.planning import memory_plan
from hfkv.planning.plan import DEVICE_OVERHEAD

HERE = Path(__file__).parent
MEMORY = 139 * 2**30 - DEVICE_OVERHEAD
# Seconds of the parts that a lease of minutes is to end within, and of them what installing hfkv may take.
MOST_SECONDS, INSTALLING = {"1": 240, "2": 240}, 25
# Tokens behind those held: of all turns, or a question.
NEW_TOKENS = 1024
CUDA = torch.device("cuda")


class BeginsError(Exception):
    """Raised where a command would begin its work."""


class Room:
    """What a command holds at once."""

    def __init__(self) -> None:
        self.weights = self.most = 0

    def check(self, what: str, num_bytes: int, device: torch.device, remedy: str) -> None:
        """Does what `check_room` does, beside the weights built so far."""
        self.most = max(self.most, self.weights + num_bytes)
        if num_bytes > models.MOST_SHARE * (MEMORY - self.weights):
            raise BenchError(f"{what} need {num_bytes / 1e9:.1f} GB beside {self.weights / 1e9:.1f} GB; {remedy}")

    def build(self, config: Any, dtype: torch.dtype, *_: object) -> Any:
        """Does what `build_model` does, without weights."""
        model = skeleton(config)
        num_bytes = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
        self.check(f"the weights of {config.num_hidden_layers} layers", num_bytes, CUDA, "build fewer")
        self.weights += num_bytes
        return model.to(dtype)


def parsed(words: list[str]) -> Setting | None:
    """Parses a command of `hfkv` up to where it would begin to work; gives what a suite is to measure."""
    found: list[Setting] = []

    def measure(name: str, given: dict[str, Any], said: str) -> None:
        found.append(bench_setting.setting_of(name, given))
        raise BeginsError

    with (
        mock.patch.object(bench_command, "_measure", measure),
        mock.patch.object(bench_setting, "pick_device", torch.device),
        mock.patch.object(doctor_command, "pick_device", torch.device),
        mock.patch.object(doctor_command, "examine", mock.Mock(side_effect=BeginsError)),
    ):
        try:
            typer.main.get_command(app)(words, prog_name="hfkv", standalone_mode=False)
        except BeginsError:
            return found[0] if found else None
    raise ValueError(f"hfkv {shlex.join(words)} does nothing")


def most_bytes(setting: Setting) -> int:
    """Gives the most bytes that a suite holds on the GPU at once; a `BenchError` where they do not fit."""
    room = Room()
    with (
        mock.patch.object(suite, "check_room", room.check),
        mock.patch.object(mla, "check_room", room.check),
        mock.patch.object(moe, "check_room", room.check),
        mock.patch.object(suite, "build_model", room.build),
        mock.patch.object(mla, "build_model", room.build),
        mock.patch.object(moe, "stock_model", mock.Mock(side_effect=BeginsError)),
        mock.patch.object(contenders, "_compile_reason", return_value=None),
    ):
        try:
            ready = runner._SUITES[setting.suite](setting)
        except BeginsError:
            return room.most  # the experts of all contenders, checked before the first is made
        for cell in ready.cells:
            if isinstance(ready, mla.MLASuite):
                model = ready.whole if cell.case.part == "step" else ready.layer
                room.weights = sum(weight.nbytes for weight in model.parameters())
                ready._check_memory(cell)
            else:
                model = getattr(ready, "model", None)
                ready.check_memory(cell)
            if model is None:
                continue
            tokens = cell.context + NEW_TOKENS
            kvs = list(dict.fromkeys(kv.removesuffix(GRAPHS) for kv in ("none", *setting.kvs)))
            plan = memory_plan(model.config, MEMORY, tokens, ready.batch, kv=kvs, dtype=ready.dtype, device="cuda")
            beside = next(weights.nbytes for weights in plan.weights if weights.name == plan.chosen)
            for cache in plan.caches:
                what = f"{cache.kv} of {ready.batch} x {tokens:,} tokens"
                room.check(what, cache.total_bytes - beside, CUDA, "take fewer tokens")
    return room.most


def is_measured(target: checks.Target, setting: Setting) -> bool:
    """Says whether a setting measures what a target is about."""
    if (target.suite, target.dtype, target.batch or 1) != (setting.suite, setting.dtype, setting.batch):
        return False
    if target.shape not in (None, setting.shape):
        return False
    if target.suite == "mla":
        cases = [(case.part, case.context) for case in setting.cases]
        return (target.part, target.context) in cases and target.contender in setting.kvs
    names = [*setting.kvs, *(setting.peers or ()), "floor"]
    is_of_caches = target.suite != "moe"
    return target.context in setting.contexts and (
        not is_of_caches or (target.contender in names and target.against in names)
    )


def main() -> int:
    seconds: Counter[str] = Counter()
    wrong, settings = 0, []
    for line in sys.stdin.read().splitlines():
        part, name, limit, *words = shlex.split(line)
        seconds[part] += int(limit)
        said = ""
        try:
            if words[0] == "hfkv":
                setting = parsed(words[1:])
                if setting is not None:
                    settings.append(setting)
                    said = f"{most_bytes(setting) / 2**30:.1f} GiB"
            elif words[:3] == ["python", "-m", "pytest"]:
                subprocess.run(
                    [sys.executable, "-m", "pytest", "--version", *words[3:-1]], check=True, capture_output=True
                )
            else:
                assert Path(words[1]).exists(), f"{words[1]} is not there"
        except Exception as error:  # whatever a command would end with
            wrong, said = wrong + 1, f"WRONG: {type(error).__name__}: {error}"
        print(f"{part} {name:<18}{limit:>5} s  {said}")
    for part, most in MOST_SECONDS.items():
        if seconds[part] + INSTALLING > most:
            wrong += 1
            print(f"WRONG: part {part} may take {seconds[part] + INSTALLING} s, more than {most}")
    for target in checks.read_targets(HERE / "targets-gpu.toml"):
        if not any(is_measured(target, setting) for setting in settings):
            wrong += 1
            print(f"WRONG: nothing measures {target}")
    print(f"{len(settings)} runs of hfkv bench, parts of {dict(seconds)} seconds at most, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
