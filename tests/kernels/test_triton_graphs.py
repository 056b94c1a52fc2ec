"""Decode steps that are captured and replayed give the tokens of those that are not."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import hfkv
from tests.kernels.interpreted import Interpreted
from tests.kernels.tape import Tape
from tests.tiny import greedy, llama, prompt
from tests.zoo import NAMED

KINDS = [
    "none",
    "int8",
    "int8+paged+page_size:4",
    "int4",
    "window:8+sinks:2",
    "int8+window:8+sinks:2+paged+page_size:4",
]
SMOKE = {"none", KINDS[-1]}


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[None]:
    """On a GPU the real thing; on a CPU the real kernels, interpreted, and a tape in place of a graph."""
    if device.type == "cuda":
        yield
        return
    from hfkv.kernels import dispatch
    from hfkv.patches import graphs

    monkeypatch.setattr(dispatch, "BACKENDS", [Interpreted(), *dispatch.BACKENDS])
    dispatch.forget_choices()
    monkeypatch.setattr(graphs, "make_graph", Tape)
    monkeypatch.setattr(graphs, "DEVICE_TYPES", {"cpu"})
    yield
    monkeypatch.undo()
    dispatch.forget_choices()


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a graph was captured and replayed."""
    from hfkv.patches import graphs

    counts = {"captures": 0, "replays": 0}
    make_graph = graphs.make_graph

    def counted() -> Any:
        graph = make_graph()
        capture, replay = graph.capture, graph.replay

        def count(name: str, do: Any, *args: Any) -> Any:
            counts[name] += 1
            return do(*args)

        graph.capture = lambda run: count("captures", capture, run)  # type: ignore[method-assign]
        graph.replay = lambda: count("replays", replay)  # type: ignore[method-assign]
        return graph

    monkeypatch.setattr(graphs, "make_graph", counted)
    return counts


def on(device: torch.device, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def same_tokens(
    model: Any, kv: str, inputs: dict[str, torch.Tensor], new_tokens: int = 12, seed: int | None = None, **options: Any
) -> None:
    texts = []
    for use_graphs in (False, True):
        with hfkv.patch(model, kv, graphs=use_graphs):
            torch.manual_seed(seed or 0)
            options.setdefault("do_sample", False)
            texts.append(model.generate(**inputs, max_new_tokens=new_tokens, **options))
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    ("family", "kv"),
    [
        *(pytest.param("llama", kv, marks=[pytest.mark.smoke] if kv in SMOKE else []) for kv in KINDS),
        ("deepseek_v3", KINDS[-1]),
    ],
)
def test_greedy(device: torch.device, counts: dict[str, int], family: str, kv: str) -> None:
    model = llama() if family == "llama" else NAMED[family]().model
    same_tokens(model.to(device), kv, on(device, {"input_ids": prompt(1)["input_ids"]}), 8)
    assert counts["captures"] == 1
    assert counts["replays"] == 6  # 8 tokens: the first from the prompt, the second as ever


@pytest.mark.parametrize("kv", ["none", "int8+paged+page_size:4"])
def test_padded_rows(device: torch.device, counts: dict[str, int], kv: str) -> None:
    same_tokens(llama().to(device), kv, on(device, prompt(2, padding=4)), 6)
    assert counts["captures"] == 1


@pytest.mark.parametrize("kv", ["int8", "paged+page_size:4"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_beams_and_samples(device: torch.device, counts: dict[str, int], kv: str, options: dict[str, Any]) -> None:
    same_tokens(llama().to(device), kv, on(device, {"input_ids": prompt(1)["input_ids"]}), 6, **options)
    assert counts["replays"] >= counts["captures"] > 0


def test_beams_do_not_capture_at_every_step(device: torch.device, counts: dict[str, int]) -> None:
    same_tokens(llama().to(device), "none", on(device, {"input_ids": prompt(1)["input_ids"]}), 8, num_beams=3)
    assert counts["captures"] == 1


def test_a_store_that_grows_is_captured_anew(device: torch.device, counts: dict[str, int]) -> None:
    model = llama().to(device)
    inputs = on(device, {"input_ids": prompt(1)["input_ids"]})
    expected = greedy(model, inputs, 10)
    with hfkv.patch(model, graphs=True):
        cache = hfkv.KVCache(model)  # nobody has told it how long the text will be
        assert torch.equal(greedy(model, inputs, 10, past_key_values=cache), expected)
    assert 1 < counts["captures"] < counts["replays"]


def test_a_second_turn_and_a_second_call(device: torch.device) -> None:
    model = llama().to(device)
    ids = prompt(1)["input_ids"].to(device)

    def turns() -> list[torch.Tensor]:
        cache = hfkv.KVCache(model)
        first = model.generate(ids, max_new_tokens=5, do_sample=False, past_key_values=cache)
        second = torch.cat((first, ids), dim=1)
        return [first, model.generate(second, max_new_tokens=5, do_sample=False, past_key_values=cache)]

    with hfkv.patch(model):
        expected = turns()
    with hfkv.patch(model, graphs=True):
        for _ in range(2):
            assert all(torch.equal(*pair) for pair in zip(turns(), expected, strict=True))


def test_sliding_layers_of_the_model(device: torch.device, counts: dict[str, int]) -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        eos_token_id=None,
    )
    model = Gemma3ForCausalLM(config).eval().to(device)
    same_tokens(model, "int8", on(device, prompt(2, padding=0)), 8)
    same_tokens(model, "none", on(device, prompt(2, padding=3)), 8)
    assert counts["captures"] == 2


REFUSED = {
    "window:8+sinks:2+sink_positions:cache": "turned sinks",
    "window:8+summary:mean+summary_page_size:4": "summaries",
    "offload": "offloaded",
    "window:8+global_heads:1=0": "different tokens for different heads",
    "int4+recent:8:int8": "in another form than the rest",
}


@pytest.mark.parametrize("kv", REFUSED)
def test_what_cannot_be_captured_runs_as_ever_and_says_why(
    device: torch.device, counts: dict[str, int], caplog: pytest.LogCaptureFixture, kv: str
) -> None:
    with caplog.at_level(logging.WARNING, logger="hfkv"):
        same_tokens(llama().to(device), kv, on(device, {"input_ids": prompt(1)["input_ids"]}), 4)
    assert REFUSED[kv] in caplog.text
    assert counts["captures"] == 0


def test_padded_windows_run_as_ever(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hfkv"):
        same_tokens(llama().to(device), "window:8", on(device, prompt(2, padding=4)), 5)
    assert "the batch is padded" in caplog.text


def test_a_step_that_cannot_be_captured_is_right_all_the_same(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama().to(device)
    own = type(model.model.norm).forward

    def reads_back(self: Any, states: torch.Tensor) -> torch.Tensor:
        float(states.sum())
        return own(self, states)

    monkeypatch.setattr(type(model.model.norm), "forward", reads_back)
    with caplog.at_level(logging.WARNING, logger="hfkv"):
        same_tokens(model, "int8", on(device, {"input_ids": prompt(1)["input_ids"]}), 6)
    assert "cannot be captured" in caplog.text


def test_hooks_forbid_graphs(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    model = llama().to(device)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING, logger="hfkv"), hfkv.patch(model, graphs=True):
        pass
    assert "forward hooks" in caplog.text


def test_outputs_are_not_overwritten_by_the_next_step(device: torch.device) -> None:
    model = llama().to(device)
    inputs = on(device, {"input_ids": prompt(1)["input_ids"]})
    results = []
    for use_graphs in (False, True):
        with hfkv.patch(model, graphs=use_graphs):
            given = model.generate(
                **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            results.append(torch.stack(given.logits))
    assert torch.allclose(*results, atol=1e-5)


def test_undo_copy_and_pickle(device: torch.device) -> None:
    model = llama().to(device)
    forward = type(model).forward
    inputs = on(device, {"input_ids": prompt(1)["input_ids"]})
    patched = hfkv.patch(model, graphs=True)
    text = greedy(model, inputs, 6)
    twin = copy.deepcopy(model)
    assert torch.equal(greedy(twin, inputs, 6), text)
    assert twin.hfkv.graphs.model is twin
    assert torch.equal(greedy(pickle.loads(pickle.dumps(model)), inputs, 6), text)
    patched.undo()
    assert "forward" not in vars(model)
    assert model.forward.__func__ is forward


def decode(model: Any, ids: torch.Tensor, steps: int, change: Any = lambda step: None) -> list[torch.Tensor]:
    """The logits of `steps` decode steps by hand; `change(step)` runs before each."""
    cache = hfkv.KVCache(model)
    logits = []
    with torch.no_grad():
        out = model(input_ids=ids, past_key_values=cache)
        for step in range(steps):
            change(step)
            positions = torch.full((1, 1), cache.get_seq_length(), device=ids.device)
            out = model(input_ids=ids[:, :1], position_ids=positions, past_key_values=cache)
            logits.append(out.logits.clone())
    return logits


def changed_weight(model: Any, step: int) -> None:
    if step == 3:
        model.lm_head.weight.data = model.lm_head.weight.data * 2


def changed_module(model: Any, step: int) -> None:
    if step == 3:
        head = torch.nn.Linear(64, 99, bias=False, device=model.device)
        torch.nn.init.constant_(head.weight, 0.01)
        model.lm_head = head


def late_hook(model: Any, step: int) -> None:
    if step == 3:
        model.model.norm.register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.parametrize("change", [changed_weight, changed_module, late_hook])
def test_a_model_that_changes_between_steps_is_not_replayed_as_it_was(device: torch.device, change: Any) -> None:
    runs = []
    for use_graphs in (False, True):
        model = llama().to(device)
        ids = prompt(1)["input_ids"].to(device)
        hfkv.patch(model, graphs=use_graphs)
        runs.append(decode(model, ids, 6, lambda step, model=model: change(model, step)))  # type: ignore[misc]
    for eager, replayed in zip(*runs, strict=True):
        assert torch.allclose(eager, replayed, atol=1e-4)


def test_an_interrupted_capture_leaves_the_cache_as_it_was(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama().to(device)
    ids = prompt(1)["input_ids"].to(device)
    hfkv.patch(model)
    expected = decode(model, ids, 4)
    hfkv.unpatch(model)
    hfkv.patch(model, graphs=True)
    norm = type(model.model.norm)
    own, calls = norm.forward, []

    def interrupted(self: Any, states: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return own(self, states)

    cache, positions = hfkv.KVCache(model), torch.full((1, 1), 9, device=device)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        model(input_ids=ids[:, :1], position_ids=positions, past_key_values=cache)
        monkeypatch.setattr(norm, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=ids[:, :1], position_ids=positions + 1, past_key_values=cache)
        monkeypatch.setattr(norm, "forward", own)
        assert cache.get_seq_length() == 10
        out = model(input_ids=ids[:, :1], position_ids=positions + 1, past_key_values=cache)
    assert torch.allclose(out.logits, expected[1], atol=1e-4)
