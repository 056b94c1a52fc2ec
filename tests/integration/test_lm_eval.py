"""The lm-evaluation-harness on the bundled model: tasks and data of our own, no network."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, T5Config

import hfkv
from hfkv import tiny_lm
from hfkv.eval import lm_eval_model, pass_key_prompt

NUM_DOCS, LENGTH = 6, 400
WINDOW = "window:64"

CHOICE = """
task: hfkv_choice
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{keys}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
TEXT = """
task: hfkv_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""
ANSWER = """
task: hfkv_answer
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{keys[0]}}"
target_delimiter: ""
generation_kwargs: {until: ["."], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
DATA = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}, cache_dir: "{cache}"}}
test_split: test
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    return tiny_lm.load(torch.float32)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three tasks over one file: a pass key at the start of a text, and texts of different lengths."""
    folder = tmp_path_factory.mktemp("tasks")
    rng, held_out = random.Random(0), tiny_lm.held_out_text()
    with (folder / "docs.jsonl").open("w") as file:
        for index in range(NUM_DOCS):
            prompt, key = pass_key_prompt(rng, held_out, LENGTH + index, depth=0.0)
            others = [f"{rng.randrange(10**5):05}" for _ in range(3)]
            text = held_out[1000 * index :][: LENGTH + 30 * index]
            file.write(json.dumps({"prompt": prompt, "keys": [key, *others], "text": text}) + "\n")
    data = DATA.format(file=folder / "docs.jsonl", cache=folder / "cache")
    for name, task in (("choice", CHOICE), ("text", TEXT), ("answer", ANSWER)):
        (folder / f"{name}.yaml").write_text(task + data)
    return folder


def harness() -> Any:
    return pytest.importorskip("lm_eval", reason='needs the lm-evaluation-harness: pip install "hfkv[eval]"')


def evaluate(lm: Any, folder: Path, *names: str) -> dict[str, Any]:
    """What the harness says of every document, by task: responses as it got them, and the metric."""
    from lm_eval.tasks import TaskManager

    done = harness().simple_evaluate(
        model=lm,
        tasks=list(names),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    return {
        name: [(sample["doc_id"], sample["filtered_resps"]) for sample in samples]
        for name, samples in done["samples"].items()
    } | {f"{name} metrics": done["results"][name] for name in names}


@pytest.fixture(scope="module")
def stock(bundled: tuple[Any, Any], tasks: Path) -> dict[str, Any]:
    """The harness's own model, without a cache of ours."""
    harness()
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = bundled
    return evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), tasks, "hfkv_choice", "hfkv_text", "hfkv_answer"
    )


def numbers(responses: Any) -> list[float]:
    """Every log-likelihood in them, in order."""
    if isinstance(responses, float):
        return [responses]
    return [number for item in responses if not isinstance(item, bool | int | str) for number in numbers(item)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_lossless_cache_gives_the_harnesss_own_numbers(
    bundled: tuple[Any, Any], tasks: Path, stock: dict[str, Any], batch_size: int
) -> None:
    model, tokenizer = bundled
    lm = lm_eval_model(model, tokenizer, "none", batch_size=batch_size)
    ours = evaluate(lm, tasks, "hfkv_choice", "hfkv_text", "hfkv_answer")
    for name in ("hfkv_choice", "hfkv_text"):
        expected = numbers(stock[name])
        assert len(expected) >= NUM_DOCS
        assert numbers(ours[name]) == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert ours["hfkv_answer"] == stock["hfkv_answer"]
    assert ours["hfkv_choice metrics"]["acc,none"] == stock["hfkv_choice metrics"]["acc,none"] == 1
    assert ours["hfkv_answer metrics"]["exact_match,none"] == 1
    assert not hasattr(model, "hfkv")


def test_a_small_window_gives_other_numbers(bundled: tuple[Any, Any], tasks: Path, stock: dict[str, Any]) -> None:
    model, tokenizer = bundled
    lm = lm_eval_model(model, tokenizer, WINDOW)
    assert lm.kv == hfkv.KVConfig.of(WINDOW)
    windowed = evaluate(lm, tasks, "hfkv_choice", "hfkv_text", "hfkv_answer")
    assert windowed["hfkv_choice metrics"]["acc,none"] < 1
    assert windowed["hfkv_answer metrics"]["exact_match,none"] == 0
    perplexities = [run["hfkv_text metrics"]["byte_perplexity,none"] for run in (stock, windowed)]
    assert perplexities[1] > 1.01 * perplexities[0]


def test_padded_rows_score_as_they_do_alone(tasks: Path) -> None:
    harness()
    # In float64: in float32 a value that lies between two codes may fall either way, by the shape of a batch.
    model, tokenizer = tiny_lm.load(torch.float64)
    alone, together = (
        evaluate(lm_eval_model(model, tokenizer, "int4+window:64", batch_size=size), tasks, "hfkv_text")
        for size in (1, NUM_DOCS)
    )
    assert numbers(together["hfkv_text"]) == pytest.approx(numbers(alone["hfkv_text"]), rel=1e-3)


def test_every_forward_goes_through_a_fresh_cache(bundled: tuple[Any, Any], tasks: Path) -> None:
    harness()
    model, tokenizer = bundled
    seen: list[tuple[str, int, int]] = []

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        cache = kwargs["past_key_values"]
        seen.append((str(cache.kv), args[0].shape[1], cache.get_seq_length()))

    hook = model.register_forward_hook(look, with_kwargs=True)
    try:
        evaluate(lm_eval_model(model, tokenizer, "int8"), tasks, "hfkv_text")
    finally:
        hook.remove()
    assert len(seen) == NUM_DOCS
    assert all(kv == "int8" and length == held for kv, length, held in seen)


def test_what_does_not_fit_is_refused(bundled: tuple[Any, Any]) -> None:
    harness()
    model, tokenizer = bundled
    with pytest.raises(ValueError, match="'int9'"):
        lm_eval_model(model, tokenizer, "int9")
    with hfkv.patch(model), pytest.raises(RuntimeError, match="already patched"):
        lm_eval_model(model, tokenizer, "int8")
    config = T5Config(vocab_size=259, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder"):
        lm_eval_model(AutoModelForSeq2SeqLM.from_config(config), tokenizer)
    lm = lm_eval_model(model, tokenizer)
    with pytest.raises(ValueError, match="encoder-decoder"):
        lm._model_call(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3), torch.ones(1, 3))


def test_without_the_harness_the_error_says_what_to_install(
    bundled: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hfkv.eval import harness as module

    module._cached_hflm.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(ImportError, match=r'pip install "hfkv\[eval\]"'):
        lm_eval_model(*bundled)
