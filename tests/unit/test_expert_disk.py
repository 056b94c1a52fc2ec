"""Experts on disk: those that accelerate has put away, and more than memory holds."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from transformers import AutoModelForCausalLM

from hfkv.experts.config import MoEConfig
from hfkv.experts.families import experts_of, weight_names
from hfkv.experts.offload.expert_file import ExpertFile, write_experts
from hfkv.experts.offload.place import offload_experts
from hfkv.experts.offload.slots import ExpertSlots
from hfkv.models.weights_at_rest import at_rest, bring_no_more
from tests.experts_to_offload import CODECS, CPU, matrices_of, resident
from tests.models_to_offload import NAME, compressed, logits, model, put


def from_disk(plain: Any, folder: Path) -> Any:
    plain.save_pretrained(folder / "model")
    device_map: dict[str, str] = {}
    for name, module in plain.named_modules():
        if not list(module.children()) or name.endswith("experts"):
            device_map[name] = "disk" if name.endswith("experts") else "cpu"
    device_map = {name: where for name, where in device_map.items() if "experts." not in name}
    direct = {name.rpartition(".")[0] for name, _ in plain.named_parameters()}
    device_map |= {name: "cpu" for name in direct if name not in device_map}
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=device_map, offload_folder=folder / "away", dtype=torch.bfloat16
    )


def offload_all(given: Any, codec: str, path: Path | None) -> Any:
    config = MoEConfig(codec=codec, offload=True, path=None if path is None else str(path))
    return {name: offload_experts(module, config, 2, name=name) for name, module in experts_of(given).items()}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_model_that_accelerate_keeps_on_disk(codec: str, kind: str, tmp_path: Path) -> None:
    plain = model(kind)
    away = from_disk(plain, tmp_path)
    away.set_experts_implementation("hfkv")
    module = away.model.layers[0].mlp.experts
    assert module.down_proj.device.type == "meta"
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    whole.set_experts_implementation("hfkv")
    expected = logits(compressed(whole, codec))
    path = None if codec == "none" else tmp_path / "experts"
    if codec != "none":
        with pytest.raises(ValueError, match="give a folder for the experts"):
            offload_all(away, codec, None)
    pairs = offload_all(away, codec, path)
    source = pairs[NAME.format(0)][0].source
    assert (Path(str(source.path)).parent == path) == (path is not None)
    put(away, pairs)
    assert torch.equal(logits(away), expected)
    if path is not None:
        # The files are there now: nothing is encoded again.
        again = offload_all(away, codec, tmp_path / "copies")
        assert torch.equal(again[NAME.format(0)][0].decode(3), pairs[NAME.format(0)][0].decode(3))


def test_what_accelerate_has_put_away_is_found_wherever_it_is(tmp_path: Path) -> None:
    for offload in (lambda given: disk_offload(given, tmp_path), cpu_offload):
        plain = model()
        expected = plain.model.layers[0].mlp.experts.gate_up_proj.clone()
        before = logits(plain)
        offload(plain)
        module = plain.model.layers[0].mlp.experts
        found = at_rest(module, "gate_up_proj")
        assert torch.equal(found.tensor, expected)
        assert (found.path is None) == (offload is cpu_offload)
        undo = bring_no_more(module, *weight_names(module))
        assert all(parameter.device.type == "meta" for parameter in module.parameters())
        undo()
        assert torch.equal(logits(plain), before)
    with pytest.raises(ValueError, match="no hook of accelerate's has its numbers"):
        at_rest(nn.Linear(2, 2, device="meta"), "weight")


def test_accelerate_brings_biases_once_and_for_good(tmp_path: Path) -> None:
    plain = model("gpt_oss")
    module = plain.model.layers[0].mlp.experts
    bias = module.down_proj_bias.clone()
    disk_offload(plain, tmp_path)
    undo = bring_no_more(module, *weight_names(module))
    assert torch.equal(module.down_proj_bias, bias)
    undo()
    assert module.down_proj_bias.device.type == "meta"


def anonymous_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", text)[1]) << 10  # type: ignore[index]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("codec", CODECS)
def test_experts_larger_than_the_memory_a_process_may_have(codec: str, tmp_path: Path) -> None:
    """A child process whose own memory may grow by a quarter of the file it computes with."""
    experts, outputs, inputs = 64, 1024, {"none": 512, "int8": 1024, "int4": 1792}[codec]
    up, down = (experts, outputs, inputs), (experts, inputs, outputs)
    planes = [resident_planes(codec, shape) for shape in (up, down)]
    path = str(tmp_path / "experts.safetensors")
    write_experts(
        path,
        "experts",
        codec,
        torch.bfloat16,
        up,
        down,
        lambda half, expert: planes[half == "down"],
        origin="",
        has_cpu_order=codec == "int4",
    )
    size = os.path.getsize(path)
    assert size > 100 << 20
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            kb = int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
            resource.setrlimit(resource.RLIMIT_DATA, ((kb << 10) + size // 4, resource.RLIM_INFINITY))
            before = anonymous_bytes()
            file = ExpertFile(path)
            slots = ExpertSlots(file.source("up"), file.source("down"), 3, "lru", CPU)
            most = 0
            x = torch.ones(1, inputs).bfloat16()
            for expert in slots.expect(range(experts)):
                with slots.holding(expert) as slot:
                    slots.weights[0].linear(x, slot)
                most = max(most, anonymous_bytes() - before)
            os.write(write, f"{slots.table.counts.misses} {most}".encode())
        except BaseException as error:
            os.write(write, repr(error).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answers:
        answer = answers.read()
    os.waitpid(child, 0)
    misses, grown = map(int, answer.split())
    assert misses == experts
    assert grown < size // 4


def resident_planes(codec: str, shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    module = nn.Module()
    matrix = torch.randn(1, *shape[1:]).bfloat16()
    module.has_gate, module.is_transposed, module.up_proj, module.down_proj = False, False, matrix, matrix  # type: ignore[assignment]
    assert len(matrices_of(module)) == 2
    (weights, _) = resident(module, codec, is_packed=False)
    return {name: plane[0] for name, plane in weights.planes().items()}
