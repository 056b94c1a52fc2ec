"""What `hfkv bench` is made of: contents, bytes, the check, turns, shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hfkv.bench import PEERS, SHAPES, BenchError, Case, Setting
from hfkv.bench.contenders import DYNAMIC, STATIC, ours, peers
from hfkv.bench.gate import Errors, logit_errors
from hfkv.bench.models import build_model, share_weights, weights_read
from hfkv.bench.results import Row, Table
from hfkv.bench.runner import compared
from hfkv.bench.suite import Cell, Suite
from hfkv.bench.suites.attention import AttentionLane, AttentionModule, attention_config
from hfkv.bench.tokens import Tokens, allocated_bytes, held_bytes
from hfkv.measure.timing import bus_bandwidth
from hfkv.models.shapes import Heads, shape_config, with_layers
from hfkv.policy.errors import RequestError
from tests.tiny import llama, llama_config

CPU = torch.device("cpu")
HEADS = Heads(4, 2, 64)
TOKEN_BYTES = 2 * 2 * 64 * 4


def lane_of(kv: str, count: int = 100, dtype: torch.dtype = torch.float32, batch: int = 2) -> AttentionLane:
    config = attention_config(shape_config("tiny", None), 2)
    tokens = Tokens(batch, count, HEADS, dtype, CPU, seed=0)
    contender = peers([kv], config, CPU)[-1] if kv in PEERS else ours(kv)
    return AttentionLane(contender, config, tokens, AttentionModule(config), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv", ["none", "int8", "int4", "fp8", "paged", "int8+paged", "window:30", "int8+window:99"])
def test_a_right_attention_stands_the_check(kv: str, dtype: torch.dtype) -> None:
    lane = lane_of(kv, dtype=dtype)
    lane.open()
    errors = lane.check()
    assert errors.wrong is None
    assert errors.twin is not None
    assert errors.full is not None
    assert errors.twin < (1e-5 if dtype == torch.float32 else 1e-2)
    lossy = {"int8": 2e-2, "int4": 0.3, "fp8": 0.1}.get(kv.split("+")[0], errors.twin + 1e-6)
    assert errors.full <= lossy


@pytest.mark.parametrize("kv", ["none", "int8", "window:30"])
@pytest.mark.parametrize("fault", ["scaled", "not finite", "one token short"])
def test_a_wrong_attention_does_not(kv: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lane = lane_of(kv)
    lane.open()
    right: Any = lane.module

    def wrong(name: str, query: Any, keys: Any, values: Any, mask: Any) -> Any:
        output = right(name, query, keys, values, mask)
        if fault == "one token short":
            plain = (states.decoded()[:, :, :-1] for states in (keys, values))
            return right("sdpa", query, *plain)
        return output * (1.01 if fault == "scaled" else torch.inf)

    wrong.scale = right.scale  # type: ignore[attr-defined]
    monkeypatch.setattr(lane, "module", wrong)
    errors = lane.check()
    assert errors.wrong is not None
    assert ("finite" in errors.wrong) == (fault == "not finite")


@pytest.mark.parametrize("kv", ["none", "int8+paged"])
def test_half_precision_is_allowed_its_rounding_and_no_more(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lane = lane_of(kv, dtype=torch.bfloat16)
    lane.open()
    right: Any = lane.module

    def wrong(*args: Any) -> Any:
        return right(*args) * 1.05

    wrong.scale = right.scale  # type: ignore[attr-defined]
    monkeypatch.setattr(lane, "module", wrong)
    assert lane.check().wrong is not None


def test_peers_attend_to_the_unquantised_keys_and_values() -> None:
    errors = {}
    for name in (DYNAMIC, STATIC, "QuantizedCache:fp8"):
        lane = lane_of(name)
        lane.open()
        errors[name] = lane.check().full
    assert errors[DYNAMIC] < 1e-5
    assert errors[STATIC] < 1e-5
    assert 1e-3 < errors["QuantizedCache:fp8"] < 0.1


def test_logits_must_agree_where_nothing_is_lost_and_be_finite_anywhere() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 9)

    def check(kv: str, given: torch.Tensor, dtype: torch.dtype = torch.float32) -> Errors:
        return logit_errors(ours(kv), given, logits, 2, dtype)

    assert check("none", logits * (1 + 1e-6)).wrong is None
    assert check("none", logits * 1.01).wrong is not None
    assert check("none", logits * 1.01, torch.bfloat16).wrong is None
    assert check("int8", logits * 1.01).wrong is None
    (stock,) = peers([DYNAMIC], llama_config(), CPU)
    assert logit_errors(stock, logits * 2, logits, 2, torch.float32).wrong is None
    lost = check("int8", logits * torch.nan).wrong
    assert lost is not None
    assert "finite" in lost


def test_bytes_are_those_of_the_tokens() -> None:
    expected = {"none": 200 * TOKEN_BYTES, "int8": 200 * 2 * 2 * (64 + 2), DYNAMIC: 200 * TOKEN_BYTES}
    expected |= {"QuantizedCache:fp8": 200 * TOKEN_BYTES // 4 + 8, STATIC: 200 * TOKEN_BYTES}
    for name, num_bytes in expected.items():
        lane = lane_of(name)
        lane.open()
        figures = lane.figures()
        assert figures["held_bytes"] == figures["read_bytes"] == pytest.approx(num_bytes, rel=1e-3), name
        assert figures["allocated_bytes"] >= figures["held_bytes"] - 1, name
        assert held_bytes(lane.cache, 2) == pytest.approx(2 * figures["held_bytes"], abs=2), name
    assert allocated_bytes(lane.cache, 1) == 2 * (100 + 4 + 8) * TOKEN_BYTES + 8


def test_a_filled_window_holds_no_more_than_in_generation() -> None:
    lane = lane_of("window:30+sinks:2", count=9000, batch=1)
    lane.open()
    assert lane.figures()["held_bytes"] <= (30 + 2 + 1) * TOKEN_BYTES


def test_all_contenders_hold_the_same_numbers() -> None:
    first, second = lane_of(DYNAMIC), lane_of("none")
    for lane in (first, second):
        lane.open()
        lane.warm_up()
        assert lane.turn()[0] > 0
    assert torch.equal(first.cache.layers[1].keys, second.cache.layers[1].keys)
    assert first.cache.layers[1].keys.shape[2] == 100 + 3


def test_peers_come_with_the_reason_they_cannot_run() -> None:
    found = peers(None, llama_config(), CPU)
    assert found[0].name == DYNAMIC
    assert {contender.name for contender in found} == set(PEERS)
    reasons = {contender.name: contender.reason for contender in found}
    assert reasons[DYNAMIC] is None
    assert "accelerator" in str(reasons["DynamicCache+offload"])
    assert "name it" in str(reasons[STATIC])
    assert [contender.name for contender in peers(["quantizedcache:FP8"], llama_config(), CPU)] == [
        DYNAMIC,
        "QuantizedCache:fp8",
    ]
    with pytest.raises(BenchError, match="'hqq' is unknown; allowed: all, no-cache"):
        peers(["hqq"], llama_config(), CPU)


@pytest.mark.parametrize("kv", ["int9", "window:64+sink_positions:cache", "window:64+global_layers:0"])
def test_a_cache_without_a_check_is_refused(kv: str) -> None:
    with pytest.raises(BenchError, match=r"int8, int4|no check"):
        ours(kv)


def test_a_shape_with_other_layers_keeps_the_rest() -> None:
    config = with_layers(shape_config("qwen3-30b-a3b", None), 3)
    assert (config.num_hidden_layers, config.num_experts, Heads.of(config)) == (3, 128, Heads(32, 4, 128))
    assert Heads.of(shape_config("llama-8b", None)).token_bytes(torch.bfloat16) * 32 == 131_072
    assert set(SHAPES) == {"llama-8b", "qwen3-30b-a3b", "small", "host", "tiny"}
    with pytest.raises(RequestError, match="'huge' is unknown; allowed: llama-8b"):
        shape_config("huge", None)
    with pytest.raises(RequestError, match="no config that could be read"):
        shape_config(None, "./no/such/folder")


def test_big_shapes_are_refused_on_a_cpu_with_the_remedy() -> None:
    with pytest.raises(BenchError, match=r"16\.1 GB of weights.*--layers"):
        build_model(shape_config("llama-8b", None), torch.bfloat16, CPU, 0, None)
    with pytest.raises(BenchError, match=r"free; build fewer with --layers"):
        build_model(with_layers(shape_config("llama-8b", None), 9000), torch.bfloat16, CPU, 0, 9000)


def test_models_share_weights_and_nothing_else() -> None:
    model = llama()
    twin = share_weights(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    twin.config.vocab_size = 1
    assert model.config.vocab_size == 99


def test_a_step_reads_no_embedding_table_and_the_chosen_experts_only() -> None:
    model = llama()
    table = model.get_input_embeddings().weight.nbytes
    assert weights_read(model, 1) == sum(weight.nbytes for weight in model.parameters()) - table
    sparse_config = with_layers(shape_config("qwen3-30b-a3b", None), 1)
    sparse_config.update({"vocab_size": 9, "hidden_size": 32, "num_experts": 8, "num_experts_per_tok": 2})
    sparse_config.update({"moe_intermediate_size": 16})
    sparse = build_model(sparse_config, torch.float32, CPU, 0, 1)
    experts = sum(weight.nbytes for name, weight in sparse.named_parameters() if ".experts." in name)
    assert experts > 0
    for batch, share in ((1, 2 / 8), (3, 6 / 8), (9, 1.0)):
        every = sum(weight.nbytes for weight in sparse.parameters()) - sparse.get_input_embeddings().weight.nbytes
        assert weights_read(sparse, batch) == pytest.approx(every - (1 - share) * experts)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"suite": "speed"}, "allowed: attention, step, memory, prefill, reuse"),
        ({"shape": None}, "a shape or a model"),
        ({"contexts": ()}, "give a context"),
        ({"contexts": (0,)}, "context must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"seconds": 0.0}, "seconds must be above 0"),
        ({"kvs": ("int8", "int8")}, "different caches"),
        ({"ragged": (4, 2)}, "prefill and host only"),
        ({"busy": -1}, "busy must be at least 0"),
        ({"suite": "memory", "busy": 1}, "in the suite memory"),
        ({"cases": (Case("decode", 8, 1),)}, "suite mla only"),
    ],
)
def test_a_setting_refuses_what_cannot_be_measured(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BenchError, match=said):
        Setting(**{"suite": "step", "shape": "tiny", "contexts": (64,), **given})


def test_layers_of_an_own_cache_are_found_by_type() -> None:
    cache = DynamicCache(config=llama_config())
    cache.update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16), 0)
    assert held_bytes(cache, 1) == allocated_bytes(cache, 1) == 2 * 2 * 3 * 16 * 4


def test_the_floor_of_what_is_offloaded_is_the_way_it_comes() -> None:
    rows = [
        Row("DynamicCache", False, p50_ms=30.0, read_bytes=10**9),
        Row("int8+offload", True, p50_ms=10.0, read_bytes=10**9, bus_bytes=4 * 10**8),
        Row("int8+offload+device_budget:1GB", True, p50_ms=2.0, read_bytes=10**9, bus_bytes=10**6),
    ]
    suite = Suite(Setting("step", shape="tiny", contexts=(8,)))
    suite.contenders = []

    def with_bus(bus: float | None) -> list[Row]:
        return compared(suite, Cell(8), Table(8, 1, [], 1, rows), copy=10**12, bus=bus).rows

    assert [row.floor_ms for row in with_bus(5 * 10**10)] == [1.0, 8.0, 1.0]
    assert [row.floor_ratio for row in with_bus(5 * 10**10)] == [30.0, 1.25, 2.0]
    assert [row.speedup for row in with_bus(None)] == [1.0, 3.0, 15.0]
    assert with_bus(None)[1].floor_ms == 1.0


def test_on_a_cpu_no_bus_is_measured() -> None:
    assert bus_bandwidth(torch.device("cpu")) is None
