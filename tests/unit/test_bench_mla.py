"""The suite ``mla``: its cases, layer, check, ratios and targets. No time is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache

from hfkv.attention.function import hfkv_attention
from hfkv.bench import (
    MLA_SHAPES,
    BenchError,
    Case,
    Result,
    Row,
    Setting,
    Table,
    cases_of,
    check_results,
    read_targets,
    run,
)
from hfkv.bench.contenders import ours
from hfkv.bench.setting import PARTS
from hfkv.bench.suites.mla import LatentTokens, MLASuite
from hfkv.bench.suites.mla_layer import LayerLane, LayerTask, layer_call
from hfkv.bench.suites.step import StepLane
from hfkv.measure.timing import COPY_BYTES
from hfkv.models.layer_shapes import MLAShape
from hfkv.policy.errors import RequestError
from tests.tiny import llama

CPU = torch.device("cpu")
SHAPE = MLA_SHAPES["mla-tiny"]
CASES = (
    Case("decode", 40, 1),
    Case("step", 40, 1),
    Case("prefill", 0, 24),
    Case("prefill", 40, 8),
    Case("crossover", 40, 8),
)
SETTING = Setting("mla", "mla-tiny", cases=CASES, dtype="float32", kvs=("none", "int8"), steps=1, layers=2, batch=2)


@pytest.fixture(autouse=True, scope="module")
def _quickly() -> Any:
    """Bandwidth from a glance, and nothing tidied up in between: no figure is looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COPY_BYTES, "cpu", 2**20)
        patch.setattr("hfkv.bench.runner.free_memory", lambda: None)
        yield


@pytest.fixture(scope="module")
def result() -> Result:
    return run(SETTING)


@pytest.mark.parametrize(
    ("parts", "tokens", "queries", "wanted"),
    [
        (("decode", "step"), (), (), [("decode", 16_384, 1), ("step", 8192, 1)]),
        (("decode",), (8, 16), (4,), [("decode", 8, 1), ("decode", 16, 1)]),
        (("prefill",), (), (), [*(("prefill", 0, new) for new in (256, 1024, 4096)), ("prefill", 8192, 512)]),
        (("prefill",), (8,), (), [("prefill", 0, 8)]),
        (("prefill",), (8, 16), (4,), [("prefill", 8, 4), ("prefill", 16, 4)]),
        (("crossover",), (), (16, 170), [("crossover", 4096, 16), ("crossover", 4096, 170)]),
        (("crossover",), (8,), (4,), [("crossover", 8, 4)]),
    ],
)
def test_words_become_cases(parts: Any, tokens: Any, queries: Any, wanted: list[Any]) -> None:
    cases = cases_of(parts, tokens, queries)
    assert [(case.part, case.held, case.new) for case in cases] == wanted
    assert all(case.context == (case.held or case.new) for case in cases)


def test_every_part_is_measured_unless_named() -> None:
    parts = [case.part for case in cases_of(PARTS)]
    assert parts == ["decode", "step", *["prefill"] * 4, *["crossover"] * 7]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"part": "prompt"}, "part 'prompt' is unknown; allowed: decode, step, prefill, crossover"),
        ({"held": 0}, "at least 1 new token, got 1, and 1 held"),
        ({"new": 2}, "one new token at a time, got 2"),
    ],
)
def test_a_case_refuses_what_it_is_not(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BenchError, match=said):
        Case(**{"part": "decode", "held": 8, "new": 1, **given})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"suite": "moe"}, "suite mla only, got the suite 'moe'"),
        ({"cases": ()}, "at least one; got 0"),
        ({"cases": (CASES[0], CASES[0])}, "different cases"),
        ({"peers": ("StaticCache",)}, "against DynamicCache"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"model": "a/b"}, "a shape or a model, one of them"),
    ],
)
def test_a_setting_refuses_what_means_nothing(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BenchError, match=said):
        replace(SETTING, **given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"shape": "llama-8b"}, "no shape 'llama-8b'; allowed: deepseek-v2-lite, deepseek-v3, mla-tiny"),
        ({"kvs": ("int9",)}, "'int9'"),
        ({"cases": (Case("decode", 10**9, 1),)}, "fewer --tokens or a smaller --batch"),
    ],
)
def test_what_cannot_be_measured_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BenchError, match=said):
        run(replace(SETTING, **given))


def test_a_model_without_latents_is_refused() -> None:
    with pytest.raises(
        RequestError, match="'llama' lacks kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim"
    ):
        MLAShape.of(llama().config)
    assert MLAShape.of(SHAPE.config(SHAPE.num_hidden_layers)) == SHAPE


@pytest.mark.parametrize(("held", "new"), [(20, 1), (20, 6), (0, 6)])
def test_a_layer_is_called_as_its_model_calls_it(held: int, new: int) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPE.config(1), dtype=torch.float32).eval()
    latents = LatentTokens(2, held, SHAPE, torch.float32, CPU, seed=0)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    seen: list[Any] = []
    module: Any = model.model.layers[0].self_attn
    handle = module.register_forward_hook(
        lambda module, given, named, output: seen.append((named["hidden_states"], output[0])), with_kwargs=True
    )
    with torch.no_grad():
        for cache in caches:
            if held:
                cache.update(latents.keys, latents.values, 0)
        model(torch.randint(131, (2, new)), past_key_values=caches[0])
        handle.remove()
        ((hidden, wanted),) = seen
        assert torch.equal(layer_call(model, hidden, held, caches[1])(), wanted)
        task = LayerTask(model, latents, Case("prefill", held, new), batch=2, seed=0)
        task.hidden = hidden
        torch.testing.assert_close(task.standard, wanted, rtol=1e-4, atol=1e-6)
        if new == 1:
            layer = caches[1].layers[0]
            torch.testing.assert_close(task.over(layer.keys, layer.values), wanted, rtol=1e-4, atol=1e-6)


def test_a_run_has_a_table_of_each_case(result: Result) -> None:
    assert (result.suite, result.shape, result.model_layers) == ("mla", "mla-tiny", SHAPE.num_hidden_layers)
    assert result.setting["cases"] == tuple(asdict(case) for case in CASES)
    assert not result.wrong
    a_token = (SHAPE.kv_lora_rank + SHAPE.qk_rope_head_dim) * 4
    for case, table in zip(CASES, result.tables, strict=True):
        rows = {row.contender: row for row in table.rows}
        stock = rows["DynamicCache"]
        layers = 2 if case.part == "step" else 1
        assert (table.context, table.batch, table.layers) == (case.context, 2, layers)
        own = ["none", "absorbed", "expanded"] if case.part == "crossover" else ["none", "int8"]
        assert list(rows) == ["DynamicCache", *own]
        assert stock.held_bytes == rows["none"].held_bytes == 2 * layers * case.context * a_token
        for row in table.rows:
            # Of a decode step the first of four layers is not counted.
            assert (row.status, row.num_samples) == ("ok", {"step": 4, "decode": 3}.get(case.part, 1))
            assert row.p50_ms is not None
            assert row.speedup == pytest.approx(stock.p50_ms / row.p50_ms)
            assert (row.floor_ratio is not None) == (case.new == 1)
            assert (row.error_twin is not None) == (case.part == "decode" and row.contender == "int8")
            error = row.error_logits if case.part == "step" else row.error_full
            assert error is not None
            assert 1e-4 < error < 5e-2 if row.contender == "int8" else error < 1e-5
        if case.part == "decode":
            assert rows["int8"].error_twin < 1e-5
            module = MLASuite(SETTING).layer.model.layers[0].self_attn
            weights = sum(weight.nbytes for weight in module.parameters())
            assert stock.read_bytes == stock.held_bytes + weights


def test_either_form_is_asked_for_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    @contextmanager
    def forced(form: str) -> Iterator[None]:
        asked.append(form)
        yield

    monkeypatch.setattr("hfkv.attention.latent.crossover.forced", forced)
    run(replace(SETTING, cases=(CASES[4],), steps=3))
    # The check's call, two to warm up, and the timed ones.
    assert {form: asked.count(form) for form in asked} == {"absorbed": 6, "expanded": 6}


def scaled(*args: Any, **kwargs: Any) -> Any:
    output, weights = hfkv_attention(*args, **kwargs)
    return 1.1 * output, weights


@pytest.mark.parametrize("case", CASES[:3])
def test_no_speed_is_told_of_a_wrong_layer(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "hfkv", scaled)
    (table,) = run(replace(SETTING, cases=(case,))).tables
    rows = {row.contender: row for row in table.rows}
    assert rows["DynamicCache"].status == "ok"
    for name in ("none", "int8") if case.part == "decode" else ("none",):
        assert (rows[name].status, rows[name].p50_ms, rows[name].speedup) == ("wrong", None, None)
        assert "allowed" in str(rows[name].note)


def test_a_codec_that_gives_no_numbers_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        AttentionInterface._global_mapping,
        "hfkv",
        lambda *args, **kwargs: (torch.inf * scaled(*args, **kwargs)[0], None),
    )
    (table,) = run(replace(SETTING, cases=(CASES[3],))).tables
    assert [row.status for row in table.rows] == ["ok", "wrong", "wrong"]
    assert "not finite" in str(table.rows[2].note)


def test_without_dynamic_cache_its_error_is_measured_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: dict[type, Any] = {kind: kind.open for kind in (LayerLane, StepLane)}

    def full(lane: Any) -> None:
        if not lane.contender.is_ours:
            raise MemoryError("no room")
        opened[LayerLane if isinstance(lane, LayerLane) else StepLane](lane)

    for kind in opened:
        monkeypatch.setattr(kind, "open", full)
    (of_step,) = run(replace(SETTING, cases=(CASES[1],))).tables
    assert [row.status for row in of_step.rows] == ["left out"] * 3
    assert "whose logits are the standard" in str(of_step.rows[1].note)
    (table,) = run(replace(SETTING, cases=(CASES[0],), dtype="bfloat16")).tables
    assert [row.status for row in table.rows] == ["left out", "ok", "ok"]
    assert table.rows[0].note == "out of memory: no room"
    assert all(row.speedup is None for row in table.rows)


@pytest.mark.parametrize(
    ("kv", "part", "said"),
    [
        ("none+reuse", "decode", "see the suite reuse"),
        ("none+graphs", "decode", "see the part step"),
        ("none+graphs", "step", "need a GPU"),
    ],
)
def test_what_a_part_does_not_run_has_the_reason(kv: str, part: str, said: str) -> None:
    setting = replace(SETTING, kvs=(kv,))
    suite = MLASuite(replace(setting, cases=(Case(part, 8, 1),)))
    (cell,) = suite.cells
    contender = suite.contenders_of(cell)[1]
    assert contender.name == ours(kv).name
    assert said in str(suite.reason(contender, cell))


RATIO = '[[ratio]]\nsuite = "mla"\ncontender = "int8"\n'


def verdicts(tmp_path: Path, result: Result, *ratios: str) -> list[str]:
    path = tmp_path / "targets.toml"
    path.write_text("".join(f"{RATIO}{ratio}\n" for ratio in ratios))
    return [verdict.verdict for verdict in check_results(read_targets(path), [result])]


def test_targets_are_about_a_part_and_its_tokens(result: Result, tmp_path: Path) -> None:
    times = {"DynamicCache": 8.0, "none": 2.0, "int8": 1.0}
    tables = [
        Table(
            case.context,
            2,
            [],
            1,
            [Row(name, name != "DynamicCache", p50_ms=ms * case.new) for name, ms in times.items()],
        )
        for case in CASES[:4]
    ]
    tables[0] = replace(tables[0], rows=[replace(row, held_bytes=100, p50_ms=1.0) for row in tables[0].rows])
    made = replace(result, tables=tables)
    path = tmp_path / "result.json"
    made.write_json(path)
    for seen in (made, Result.read_json(path)):
        assert verdicts(
            tmp_path,
            seen,
            'part = "decode"\ncontext = 40\nat_least = 1.5',
            'part = "step"\ncontext = 40\nat_least = 7.5',
            'part = "prefill"\ncontext = 40\nqueries = 8\nat_least = 7.5',
            'part = "prefill"\ncontext = 24\nat_least = 8.5',
            'part = "decode"\ncontext = 40\nagainst = "none"\nmax_held = 0.54',
            'part = "prefill"\ncontext = 40\nqueries = 9\nat_least = 1.0',
        ) == ["missed", "held", "held", "missed", "missed", "not measured"]
    with pytest.raises(BenchError, match=r"mla step, 41 tokens.*no context of 41 tokens; it has 40"):
        verdicts(tmp_path, made, 'part = "step"\ncontext = 41\nat_least = 1.0')
