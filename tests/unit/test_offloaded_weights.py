"""`OffloadedWeights` in the place of any other: gradients, decoding, writing, copies, and what is refused."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch

from hfkv.experts.config import MoEConfig
from hfkv.experts.implementation import experts_forward
from hfkv.experts.offload.offloaded import OffloadedWeights
from hfkv.experts.offload.place import offload_experts, slots_for_budget
from hfkv.experts.stack import ExpertStack
from tests.experts_to_offload import CODECS, CPU, E, K, behind_a_bus, module, offloaded, resident, tokens, with_weights


def test_gradients_reach_the_inputs(tmp_path: Path) -> None:
    experts = module(torch.float32)
    grads = []
    x, index, weights = tokens(20, torch.float32)
    for pair in (resident(experts, "int8"), offloaded(experts, "int8", K, tmp_path)):
        given = x.clone().requires_grad_()
        experts_forward(with_weights(experts, pair), given, index, weights).square().sum().backward()
        grads.append(given.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("codec", CODECS)
def test_decoding_goes_past_the_slots(codec: str, tmp_path: Path) -> None:
    experts = module()
    up, _ = offloaded(experts, codec, K, tmp_path)
    expected = resident(experts, codec)[0]
    up.slots.bring([4])
    before = copy.copy(up.slots.table.counts)
    assert torch.equal(up.read_all(), expected.read_all())
    assert torch.equal(ExpertStack(up)[3], expected.decode(3))
    assert (up.slots.table.counts, list(up.slots.table.slot_of)) == (before, [4])
    up.decode(4).zero_()
    up.decode(5).zero_()
    assert torch.equal(up.read_all(), expected.read_all())
    with pytest.raises(RuntimeError, match="are not written to; load the model without offload"):
        up.write(0, expected.decode(0))


@pytest.mark.parametrize("codec", CODECS)
def test_experts_in_host_memory_can_be_written_to(codec: str) -> None:
    experts = module()
    slots = behind_a_bus(experts, codec, K)
    up = OffloadedWeights(slots, 0)
    expected = resident(experts, codec, is_packed=False)[0]
    slots.bring([1])
    new = torch.randn(expected.shape[1:]).bfloat16()
    for expert in (0, 1):  # one that is away, and one that is in a slot
        up.write(expert, new)
        expected.write(expert, new)
    assert torch.equal(up.read_all(), expected.read_all())
    slots.bus.settle()  # type: ignore[union-attr]
    assert torch.equal(slots.weights[0].decode(slots.table.slot_of[1]), expected.decode(1))
    assert isinstance(up.to(CPU, torch.bfloat16), type(resident(experts, codec)[0]))
    with pytest.raises(ValueError, match="an expert here is a matrix"):
        up.write(0, new.t())


def test_copies_share_slots_of_their_own(tmp_path: Path) -> None:
    experts = module()
    away = with_weights(experts, offloaded(experts, "int8", K, tmp_path))
    copied = copy.deepcopy(away)
    up, down = copied.gate_up_proj.weights, copied.down_proj.weights
    assert up.slots is down.slots is not away.gate_up_proj.weights.slots
    again = copy.deepcopy(away)
    assert again.gate_up_proj.weights.slots is again.down_proj.weights.slots is not up.slots
    stored = io.BytesIO()
    torch.save(away, stored)
    assert len(stored.getvalue()) < 20_000
    loaded = torch.load(io.BytesIO(stored.getvalue()), weights_only=False)
    x = tokens(9)
    for other in (copied, again, loaded):
        assert torch.equal(experts_forward(other, *x), experts_forward(away, *x))
    wide = away.to(torch.float32)
    assert wide.down_proj.weights.dtype == torch.float32
    assert wide.down_proj.weights.slots is wide.gate_up_proj.weights.slots
    narrow = experts_forward(copied, *x)
    torch.testing.assert_close(experts_forward(wide, x[0].float(), *x[1:]).bfloat16(), narrow, atol=0.1, rtol=0.1)


def test_what_tells_weights_apart_is_a_few_bytes(tmp_path: Path) -> None:
    digests = []
    for number in range(2):
        up, down = offloaded(module(), "int4", K, tmp_path / str(number))
        digests += [bytes(weights.planes()["digest"].tolist()) for weights in (up, down)]
    assert len(set(digests)) == 4
    assert max(map(len, digests)) < 64


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    experts = module()
    with pytest.raises(ValueError, match="give a folder for the experts"):
        offload_experts(experts, MoEConfig(offload=True), K)
    with pytest.raises(ValueError, match="num_slots must be at least 1"):
        offloaded(experts, "none", 0, tmp_path)
    slots = behind_a_bus(experts, "int8", K)
    with pytest.raises(ValueError, match="3 experts for 2 slots"):
        slots.bring([0, 1, 2])
    there = with_weights(experts, resident(experts, "int8"))
    with pytest.raises(ValueError, match="int8 already and is not written as int4"):
        offloaded(there, "int4", K, tmp_path)


def test_slots_for_a_budget() -> None:
    layers = [module() for _ in range(3)]
    for codec in CODECS:
        of_slot = sum(weights.nbytes() // E for weights in resident(layers[0], codec)) * 3
        assert slots_for_budget(layers, None, codec) == K
        assert slots_for_budget(layers, 4 * of_slot + 1, codec) == 4
        assert slots_for_budget(layers, 100 * of_slot, codec) == E
        assert slots_for_budget(layers, of_slot, codec, top_k=1) == 1
        with pytest.raises(ValueError, match=f"give at least {2 * of_slot:,} bytes"):
            slots_for_budget(layers, 2 * of_slot - 1, codec)
