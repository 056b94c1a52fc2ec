"""Offloaded experts against accelerate's own offload of the same model: milliseconds of one decode step.

``python docs/benchmarks/expert_offload.py [--layers 4] [--steps 24] [--json FILE]``. A Mixtral of random weights
(H 1024, I 2048, E 16, K 2, bf16) reads one token at a time; only its experts are offloaded, the rest stays where it is.
Elapsed time is what a user waits for; processor time is that of this process, which other programs disturb less. Three
temperatures:

- warm: slots hold what the tokens before brought; files are in the page cache.
- cold slots: slots are emptied before each token; files are in the page cache.
- cold file: slots are emptied, and the files dropped from the page cache, before each token.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import cpu_offload, disk_offload
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from hfkv.experts.config import MoEConfig
from hfkv.experts.families import experts_of, weight_names
from hfkv.experts.offload.place import offload_experts
from hfkv.experts.offload.trace import ExpertTrace
from hfkv.experts.packed import PackedWeights
from hfkv.experts.stack import ExpertStack, as_parameter

E, K = 16, 2


def build(layers: int) -> Any:
    """The model, of random weights: its routers prefer experts less than trained ones do."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=E,
        num_experts_per_tok=K,
        vocab_size=4096,
    )
    return MixtralForCausalLM(config).bfloat16().eval().requires_grad_(False)


def put(model: Any, name: str, pair: Any) -> None:
    """What `hfkv.patch` does with the experts of one layer."""
    module = experts_of(model)[name]
    for parameter, weights in zip(weight_names(module), pair, strict=True):
        module._parameters[parameter] = as_parameter(ExpertStack(weights, module.is_transposed), False)


def step_times(model: Any, steps: int, before: Callable[[], None] | None) -> list[tuple[float, float]]:
    """Milliseconds, elapsed and of processors, of single tokens after two that do not count."""
    torch.manual_seed(1)
    ids = torch.randint(0, 4096, (steps + 2, 1, 1))
    times = []
    for token in ids:
        if before is not None:
            before()
        start, worked = time.perf_counter(), time.process_time()
        model(token, use_cache=False)
        times.append(((time.perf_counter() - start) * 1e3, (time.process_time() - worked) * 1e3))
    return times[2:]


def drop(folder: Path) -> None:
    """Takes the files of a folder out of the page cache; nobody may have them mapped."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fdatasync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Ours:
    """A model whose experts are offloaded to a folder."""

    def __init__(self, model: Any, codec: str, slots: int, folder: Path) -> None:
        self.model, self.codec, self.slots, self.folder = copy.deepcopy(model), codec, slots, folder / codec
        self.model.set_experts_implementation("hfkv")
        self.trace = ExpertTrace()
        self.plain = {name: dict(module._parameters) for name, module in experts_of(self.model).items()}
        self.open()

    def open(self) -> None:
        """With empty slots."""
        self.trace = ExpertTrace()
        for name, parameters in self.plain.items():
            module = experts_of(self.model)[name]
            module._parameters.update(parameters)
            config = MoEConfig(codec=self.codec, offload=True, path=str(self.folder))
            put(self.model, name, offload_experts(module, config, self.slots, self.trace, name=name))
        gc.collect()

    def empty(self) -> None:
        """Empties the slots."""
        for module in experts_of(self.model).values():
            module.down_proj.weights.slots.table.empty()

    def empty_and_drop(self) -> None:
        """Empties the slots, and takes the files out of the page cache."""
        for name, parameters in self.plain.items():
            experts_of(self.model)[name]._parameters.update(parameters)
        gc.collect()
        drop(self.folder)
        self.open()


def measure(layers: int, steps: int, folder: Path) -> list[dict[str, Any]]:
    """Every way of keeping experts, at every temperature it has."""
    model = build(layers)
    found: list[dict[str, Any]] = []

    def take(name: str, temperature: str, times: list[tuple[float, float]], **more: Any) -> None:
        elapsed, worked = zip(*times, strict=True)
        ordered = statistics.quantiles(elapsed, n=5)
        found.append(
            {
                "name": name,
                "temperature": temperature,
                "p20_ms": ordered[0],
                "p50_ms": statistics.median(elapsed),
                "p80_ms": ordered[3],
                "cpu_ms": statistics.median(worked),
                **more,
            }
        )

    few = max(steps // 4, 6)
    model.set_experts_implementation("grouped_mm")
    take("resident, transformers grouped_mm", "warm", step_times(model, steps, None))
    away = copy.deepcopy(model)
    for module in experts_of(away).values():
        cpu_offload(module)
    take("accelerate cpu_offload", "warm", step_times(away, steps, None))
    away = copy.deepcopy(model)
    for name, module in experts_of(away).items():
        disk_offload(module, folder / "accelerate" / name)
    take("accelerate disk_offload", "warm", step_times(away, steps, None))
    take("accelerate disk_offload", "cold file", step_times(away, few, lambda: drop(folder / "accelerate")))
    del away
    model.save_pretrained(folder / "model")
    away = AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=device_map(model), offload_folder=folder / "from_pretrained", dtype=torch.bfloat16
    )
    name = "accelerate, from_pretrained to disk"
    take(name, "warm", step_times(away, steps, None))
    take(name, "cold file", step_times(away, few, lambda: drop(folder / "from_pretrained")))
    del away
    packed = copy.deepcopy(model)
    packed.set_experts_implementation("hfkv")
    for name, module in experts_of(packed).items():
        put(packed, name, [PackedWeights(getattr(module, each).detach()) for each in weight_names(module)])
    take("resident, hfkv packed", "warm", step_times(packed, steps, None))
    del packed
    for codec, slots in (("none", K), ("none", E // 2), ("none", E), ("int8", E // 2), ("int4", E // 2)):
        ours = Ours(model, codec, slots, folder / "ours")
        name = f"hfkv {codec}, {slots} of {E} slots"
        times = step_times(ours.model, steps, None)
        take(name, "warm", times, hit_rate=ours.trace.hit_rate())
        if slots == E // 2:
            take(name, "cold slots", step_times(ours.model, steps, ours.empty))
            take(name, "cold file", step_times(ours.model, few, ours.empty_and_drop))
        del ours
        gc.collect()
    return found


def device_map(model: Any) -> dict[str, str]:
    """Experts on disk, everything else on the CPU."""
    places = {name.rpartition(".")[0]: "cpu" for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return {name: "disk" if name.endswith("experts") else place for name, place in places.items()}


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder, torch.no_grad():
        found = measure(given.layers, given.steps, Path(folder))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads"
    table = Table(title=f"{given.layers} layers of {E} experts, one token ({versions})")
    for column in ("experts", "temperature", "p20", "p50", "p80 ms", "cpu ms", "hit rate"):
        table.add_column(column, justify="left" if column in ("experts", "temperature") else "right")
    for row in found:
        times = (f"{row[each]:.1f}" for each in ("p20_ms", "p50_ms", "p80_ms", "cpu_ms"))
        rate = f"{row['hit_rate']:.0%}" if "hit_rate" in row else ""
        table.add_row(row["name"], row["temperature"], *times, rate)
    Console(width=120).print(table)
    if given.json is not None:
        given.json.write_text(json.dumps({"versions": versions, "layers": given.layers, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
