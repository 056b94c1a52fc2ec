"""The suite ``moe``: its layers, routing, check, floors and ratios. No time is looked at."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hfkv.bench import MOE_PEERS, MOE_SHAPES, BenchError, Setting, run
from hfkv.bench.contenders import Contender
from hfkv.bench.results import OK
from hfkv.bench.suites.moe import CHECKED_TOKENS, PEAK_SIZE, Calls, Gate, MoELane
from hfkv.bench.suites.moe_layers import (
    NAMES,
    Adapters,
    build_layer,
    experts_of,
    ours,
    peers,
    reference,
    stock_model,
)
from hfkv.experts.stack import ExpertStack
from hfkv.measure.timing import COPY_BYTES
from hfkv.models.layer_shapes import MoEShape

CPU = torch.device("cpu")
SHAPE = MOE_SHAPES["moe-tiny"]
SETTING = Setting("moe", shape="moe-tiny", contexts=(1, 8), dtype="float32", steps=1)
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason='pip install "hfkv[lora]"')


@pytest.fixture(autouse=True, scope="module")
def _quickly() -> Any:
    """Bandwidth and peak from a glance: no figure is looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COPY_BYTES, "cpu", 2**20)
        patch.setitem(PEAK_SIZE, "cpu", 128)
        yield


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def stock() -> Any:
    return stock_model(SHAPE, torch.float32, CPU, seed=0)


@pytest.fixture(scope="module")
def adapters() -> Adapters:
    return Adapters(SHAPE, CPU, seed=1)


def calls_of(tokens: int, shape: MoEShape = SHAPE, dtype: torch.dtype = torch.float32) -> Calls:
    return Calls(shape, tokens, dtype, CPU, seed=2)


def gate_of(stock: Any, adapters: Adapters, tokens: int, dtype: torch.dtype = torch.float32) -> Gate:
    gate = Gate({False: reference(stock, None), True: reference(stock, adapters)}, calls_of(tokens, dtype=dtype))
    (grouped,) = peers(["grouped_mm"], CPU)
    gate.errors(grouped, build_layer(grouped, stock, adapters))
    return gate


@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_a_routing_is_new_each_time_and_the_same_for_all(tokens: int) -> None:
    calls, again = calls_of(tokens), calls_of(tokens)
    assert torch.equal(again[3].chosen, calls[3].chosen)  # asked for in another order
    assert torch.equal(again[3].weights, calls[3].weights)
    assert not all(torch.equal(calls[0].chosen, calls[index].chosen) for index in range(1, 6))
    for index in range(20):
        call = calls[index]
        assert all(len(set(row)) == SHAPE.top_k for row in call.chosen.tolist())
        assert call.num_chosen == len(set(call.chosen.flatten().tolist()))
        assert call.weights.sum(dim=1).tolist() == pytest.approx([1.0] * tokens)


def test_every_expert_is_as_likely_as_any() -> None:
    counts = torch.bincount(calls_of(4000)[0].chosen.flatten(), minlength=SHAPE.experts) / 4000
    assert counts.tolist() == pytest.approx([SHAPE.top_k / SHAPE.experts] * SHAPE.experts, rel=0.15)


def test_the_reference_is_the_eager_layer(stock: Any, adapters: Adapters) -> None:
    (eager,) = [contender for contender in peers(["eager"], CPU) if contender.name == "eager"]
    call = calls_of(12)[0]
    given = call[:3]
    assert torch.equal(reference(stock, None)(*given), build_layer(eager, stock, adapters).experts(*given))
    moved = reference(stock, adapters)(*given)
    assert 0.03 < (moved - reference(stock, None)(*given)).norm() / moved.norm() < 0.5


@pytest.mark.parametrize(
    ("text", "name", "form", "share"),
    [("auto", "hfkv", "packed", 1.0), ("int8", "hfkv int8", "int8", 0.54), ("int4", "hfkv int4", "int4", 0.34)],
)
def test_ours_are_the_patched_layer_and_pass(
    stock: Any, adapters: Adapters, text: str, name: str, form: str, share: float
) -> None:
    contender = ours(text)
    layer = build_layer(contender, stock, adapters)
    assert (contender.name, contender.is_ours, contender.reason) == (name, True, None)
    assert str(layer.form).startswith(f"{form}: ")
    assert isinstance(layer.experts._parameters["down_proj"], ExpertStack)
    assert layer.experts.config._experts_implementation == "hfkv"
    plain = SHAPE.experts * SHAPE.expert_size * 4
    assert layer.held_bytes <= plain * (share if text == "auto" else share / 2)
    for tokens in (1, 40):
        errors = gate_of(stock, adapters, tokens).errors(contender, layer)
        assert errors.wrong is None
        assert errors.full is not None
        assert errors.full < {"auto": 1e-5, "int8": 2e-2, "int4": 0.12}[text]
    assert not isinstance(experts_of(stock)._parameters["down_proj"], ExpertStack)
    assert experts_of(stock).config._experts_implementation == "grouped_mm"


@needs_peft
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_the_same_for_all(adapters: Adapters, dtype: torch.dtype) -> None:
    stock = stock_model(SHAPE, dtype, CPU, seed=0)
    gate = gate_of(stock, adapters, 8, dtype)
    (peft,) = [contender for contender in peers(None, CPU) if contender.name == "PEFT"]
    plain = build_layer(ours("auto"), stock, adapters)
    for contender in (peft, ours("auto+lora"), ours("int8+lora")):
        layer = build_layer(contender, stock, adapters)
        errors = gate.errors(contender, layer)
        assert errors.wrong is None
        exact = 1e-5 if dtype == torch.float32 else 1e-2
        assert errors.full is not None
        assert errors.full < (2e-2 if "int8" in contender.name else exact)
        if contender.name == "hfkv + LoRA":
            of_adapters = sum(factor.numel() * 4 for name in NAMES for factor in adapters.factors[name])
            assert layer.held_bytes == plain.held_bytes + of_adapters
    # Without its adapters it is not what it says it is.
    assert gate.errors(replace(ours("auto"), bare="hfkv"), plain).wrong is not None


@pytest.mark.parametrize("text", ["auto", "int8"])
@pytest.mark.parametrize("fault", ["scaled", "not finite", "a token of its own"])
def test_wrong_experts_do_not_pass(stock: Any, adapters: Adapters, text: str, fault: str) -> None:
    contender = ours(text)
    layer = build_layer(contender, stock, adapters)

    def wrong(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if fault == "a token of its own":
            return layer.experts(hidden.roll(1, 0), index, weights)
        return layer.experts(hidden, index, weights) * (1.05 if fault == "scaled" else torch.inf)

    errors = gate_of(stock, adapters, 8).errors(contender, layer._replace(experts=wrong))
    assert errors.wrong is not None
    assert ("finite" in errors.wrong) == (fault == "not finite")


def test_a_single_token_is_checked_often_enough_and_without_the_base_nothing_is(stock: Any, adapters: Adapters) -> None:
    gate = Gate({False: reference(stock, None)}, calls_of(1))
    assert len(gate.calls) == CHECKED_TOKENS
    with pytest.raises(BenchError, match=r"grouped_mm.*did not run at 1 tokens; ask for fewer"):
        gate.errors(ours("auto"), build_layer(ours("auto"), stock, adapters))


def test_a_lane_counts_what_its_calls_chose(stock: Any, adapters: Adapters) -> None:
    seen: list[torch.Tensor] = []
    calls = calls_of(3)
    layer = build_layer(ours("auto"), stock, adapters)
    layer = layer._replace(experts=lambda hidden, index, weights: seen.append(index))
    lane = MoELane(ours("auto"), layer, calls, gate_of(stock, adapters, 3))
    lane.open()
    lane.warm_up()
    assert [len(lane.turn()) for _ in range(3)] == [1, 1, 1]
    lane.close()
    assert lane.num_chosen == [calls[index].num_chosen for index in range(3)]
    assert all(torch.equal(seen[2 + index], calls[index].chosen) for index in range(3))


@pytest.mark.parametrize(("times_as_slow", "every"), [(0.5, 1), (4.0, 1), (10.0, 2), (500.0, 4)])
def test_a_slow_lane_sits_out_turns_and_calls_as_the_others_do(
    stock: Any, adapters: Adapters, times_as_slow: float, every: int
) -> None:
    seen: list[torch.Tensor] = []
    calls = calls_of(3)
    layer = build_layer(ours("auto"), stock, adapters)
    layer = layer._replace(experts=lambda hidden, index, weights: seen.append(index))
    gate = gate_of(stock, adapters, 3)
    first = MoELane(ours("auto"), layer, calls, gate)
    slow = MoELane(ours("auto"), layer, calls, gate, first)
    first.warm_ms, slow.warm_ms = 2.0, 2.0 * times_as_slow
    taken = [len(slow.turn()) for _ in range(8)]
    assert taken == [int(turn % every == 0) for turn in range(8)]
    assert all(torch.equal(index, calls[turn * every].chosen) for turn, index in enumerate(seen))
    assert len(slow.num_chosen) == len(seen) == sum(taken)
    assert [len(first.turn()) for _ in range(3)] == [1, 1, 1]


@pytest.fixture(scope="module")
def result() -> Any:
    return run(replace(SETTING, peers=("batched_mm", "eager", "PEFT"), moes=("auto", "int8", "auto+lora")))


@needs_peft
def test_a_run_has_all_rows_with_their_floors_and_ratios(result: Any) -> None:
    assert [table.context for table in result.tables] == [1, 8]
    assert (result.suite, result.shape, result.model_layers) == ("moe", "moe-tiny", 1)
    for table in result.tables:
        rows = {row.contender: row for row in table.rows}
        assert list(rows) == [*MOE_PEERS, "hfkv", "hfkv int8", "hfkv + LoRA"]
        assert table.base == "grouped_mm"
        operations = 2 * table.context * SHAPE.top_k * SHAPE.expert_size
        for row in table.rows:
            assert (row.status, row.num_samples, row.operations) == (OK, 1, operations)
            least = row.held_bytes * SHAPE.top_k // SHAPE.experts
            assert row.read_bytes >= least if table.context > 1 else row.read_bytes == least
            copied = row.read_bytes / result.copy_bytes_per_second
            assert row.floor_ms == pytest.approx(1e3 * max(copied, operations / result.operations_per_second))
            assert row.floor_ratio == pytest.approx(row.p50_ms / row.floor_ms)
            assert row.speedup == pytest.approx(rows["grouped_mm"].p50_ms / row.p50_ms)
            bare = {"PEFT": "grouped_mm", "hfkv + LoRA": "hfkv"}.get(row.contender)
            assert row.lora_ratio == (None if bare is None else pytest.approx(row.p50_ms / rows[bare].p50_ms))
            assert (row.form is not None) == row.is_ours


def test_a_layer_that_runs_out_of_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(contender: Contender, *given: Any) -> Any:
        if contender.name == "hfkv int8":
            raise MemoryError("no room")
        return build_layer(contender, *given)

    monkeypatch.setattr("hfkv.bench.suites.moe.build_layer", build)
    setting = replace(SETTING, contexts=(2,), peers=("grouped_mm",), moes=("auto", "int8"))
    rows = {row.contender: row for row in run(setting).tables[0].rows}
    assert (rows["hfkv"].status, rows["hfkv int8"].status) == ("ok", "left out")
    assert rows["hfkv int8"].note == "out of memory: no room"


@pytest.mark.parametrize("codec", ["auto", "int8"])
def test_no_speed_is_told_of_wrong_experts(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., torch.Tensor] = ALL_EXPERTS_FUNCTIONS["hfkv"]
    monkeypatch.setitem(type(ALL_EXPERTS_FUNCTIONS)._global_mapping, "hfkv", lambda *given: 1.1 * right(*given))
    setting = replace(SETTING, contexts=(4,), peers=("grouped_mm",), moes=(codec,))
    result = run(setting)
    (stock, row) = result.tables[0].rows
    assert (stock.status, row.status) == ("ok", "wrong")
    assert (row.p50_ms, row.speedup, row.floor_ms) == (None, None, None)
    assert "allowed" in str(row.note)
    assert result.wrong == [row]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"shape": "llama-8b"}, "no shape 'llama-8b'; allowed: moe-small, qwen3-30b-a3b, mixtral-8x7b"),
        ({"moes": ("int9",)}, r"unknown word 'int9'; allowed: auto.*\+lora puts adapters"),
        ({"moes": ("int8+offload",)}, "leave offload out"),
        ({"peers": ("sonicmoe",)}, "'sonicmoe' is unknown; allowed: all, grouped_mm"),
    ],
)
def test_what_cannot_be_measured_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BenchError, match=said):
        run(replace(SETTING, **given))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"moes": ()}, "different experts"),
        ({"moes": ("auto", "auto")}, "different experts"),
        ({"layers": 2}, "leave layers"),
        ({"batch": 4}, "leave layers"),
    ],
)
def test_a_setting_refuses_what_means_nothing(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BenchError, match=said):
        replace(SETTING, **given)


def test_a_shape_that_does_not_fit_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfkv.bench.models.free_bytes", lambda device: 10**10)
    with pytest.raises(BenchError, match=r"2\.8 GB, and . contenders need .* 10\.0 GB free; name fewer with --moe"):
        run(replace(SETTING, shape="mixtral-8x7b", dtype="bfloat16"))


def test_adapters_need_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfkv.bench.suites.moe_layers.importlib.util.find_spec", lambda name: None)
    assert "hfkv[lora]" in str(ours("auto+lora").reason)
    assert {contender.name: contender.reason is None for contender in peers(None, CPU)} == {
        "grouped_mm": True,
        "batched_mm": True,
        "PEFT": False,
    }
    assert ours("auto").reason is None
