"""What `patch` says to those who give it something else than a model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, Trainer, TrainingArguments, pipeline

import hfkv
import hfkv.eval
from hfkv import Window
from tests.tiny import llama


def said(given: Any) -> str:
    with pytest.raises(TypeError, match="takes a transformers model or a PeftModel") as refused:
        hfkv.patch(given)
    return str(refused.value)


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(hfkv.tiny_lm.PATH)


def wrapped(kind: str, model: Any, tokenizer: Any, folder: Path) -> Any:
    match kind:
        case "compiled":
            return torch.compile(model)
        case "DataParallel":
            return torch.nn.DataParallel(model)
        case "pipeline":
            return pipeline("text-generation", model=model, tokenizer=tokenizer)
        case "Trainer":
            return Trainer(model, TrainingArguments(str(folder), report_to=[]))
        case "client":
            return SimpleNamespace(llm=SimpleNamespace(pipeline=SimpleNamespace(name="tiny", model=model)))
        case "list":
            return ["a name", model]
        case "prepared":
            accelerator = accelerate.Accelerator(cpu=True)
            accelerator.prepare(model)
            return accelerator
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        return torch.nn.parallel.DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("compiled", "._orig_mod"),
        ("DataParallel", ".module"),
        ("DistributedDataParallel", ".module"),
        ("pipeline", ".model"),
        ("Trainer", ".model"),
        ("client", ".llm.pipeline.model"),
        ("list", "[1]"),
        ("prepared", "._models[0]"),
    ],
)
def test_the_way_to_the_model_is_named_and_leads_there(kind: str, path: str, tokenizer: Any, tmp_path: Path) -> None:
    model = llama()
    given = wrapped(kind, model, tokenizer, tmp_path)
    assert said(given).endswith(f"; give its {path}")
    assert eval(f"given{path}", {"given": given}) is model
    hfkv.patch(model).undo()


def test_without_a_model_it_says_how_to_come_by_one(tokenizer: Any) -> None:
    load = f"AutoModelForCausalLM.from_pretrained({hfkv.tiny_lm.PATH!r})"
    for given in (hfkv.tiny_lm.PATH, Path(hfkv.tiny_lm.PATH), tokenizer):
        assert said(given).endswith(load)
    assert "AutoModelForCausalLM.from_config(config)" in said(llama().config)
    assert "LlamaForCausalLM.from_pretrained(...)" in said(LlamaForCausalLM)
    assert "vLLM runs its own" in said(SimpleNamespace(llm_engine=SimpleNamespace()))
    for given in (None, {}, torch.nn.Linear(2, 2)):
        assert said(given).endswith("; load one: AutoModelForCausalLM.from_pretrained(...)")


def test_a_window_or_one_config_in_the_wrong_place_says_where_it_belongs() -> None:
    model = llama()
    with pytest.raises(TypeError, match=r"write KVConfig\(window=...\) around it"):
        hfkv.patch(model, Window(8))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"write \['int8'\]"):
        hfkv.eval.compare(model, torch.arange(9), "int8")
