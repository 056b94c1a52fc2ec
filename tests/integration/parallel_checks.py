"""What processes share between calls, hold and refuse, besides what each kind of cache is asked to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hfkv
from tests.integration.parallel_scenarios import KV, NEW_TOKENS, inputs, more


def reuse(kv: str, budget: int) -> Callable[[Any, Path], dict[str, Any]]:
    """Prompts that begin alike, one after the other and in one batch, within a budget of bytes."""

    def run(model: Any, folder: Path) -> dict[str, Any]:
        calls, texts, reused = [inputs(rows=1, length=20), inputs(padding=3, length=20)], [], []
        calls += [more(calls[0]["input_ids"].expand(3, -1)), inputs(seed=5, length=20), *calls]
        kv_config = hfkv.KVConfig.parse(kv)
        with hfkv.patch(model, replace(kv_config, reuse=hfkv.Reuse(budget=budget))) as patch:
            for given in calls:
                text = model.generate(**given, do_sample=False, max_new_tokens=NEW_TOKENS)
                texts.append(text.tolist())
                reused.append(patch.reuse_stats().tokens_reused)
            stats = patch.reuse_stats()
        return {"tokens": texts, "reused": reused, "hits": stats.hits, "evictions": stats.evictions}

    return run


def learned_prefix(model: Any, folder: Path) -> dict[str, Any]:
    """PEFT's prefix tuning, whose learned keys and values go into every layer's cache."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    prefix = peft.get_peft_model(model, peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, parameter in prefix.named_parameters():
            if "prompt_encoder" in name:
                parameter.normal_(0, 0.8)
    try:
        with hfkv.patch(prefix, "none"):
            text = prefix.generate(**inputs(padding=3), do_sample=False, max_new_tokens=NEW_TOKENS)
    except NotImplementedError as error:
        return {"said": str(error)}
    return {"tokens": text.tolist()}


def error_of(do: Callable[[], Any]) -> str:
    """What a refusal says; "nothing" where there is none."""
    try:
        do()
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return "nothing"


def one_refuses(model: Any, folder: Path) -> dict[str, Any]:
    """Weights change in one process only, between two turns."""
    with hfkv.patch(model, "int8"):
        cache = model.hfkv.new_cache()
        text = model.generate(**inputs(), past_key_values=cache, do_sample=False, max_new_tokens=4)
        weight = next(model.parameters())
        rank = torch.distributed.get_rank()
        if rank == 0:
            weight.data.mul_(1.5)
        said = error_of(lambda: model.generate(**more(text), past_key_values=cache, max_new_tokens=2))
        if rank == 0:
            weight.data.div_(1.5)
        cache.reset()
        again = model.generate(**inputs(), past_key_values=cache, do_sample=False, max_new_tokens=4)
    return {"said": said, "same": torch.equal(text, again)}


def others_file(model: Any, folder: Path) -> dict[str, Any]:
    """The file of another process is no file of this one's."""
    cache = hfkv.KVCache(model)
    model.generate(**inputs(), past_key_values=cache, max_new_tokens=2)
    cache.save(folder / "mine.safetensors", model)
    torch.distributed.barrier()
    rank = torch.distributed.get_rank()
    other = folder.parent / str(1 - rank) / "mine.safetensors"
    said = error_of(lambda: hfkv.KVCache.load(other, model))
    torch.distributed.barrier()
    return {"said": said}


def refusals(model: Any, folder: Path) -> dict[str, Any]:
    """What cannot be right on a spread model."""
    window = hfkv.Window(size=8)
    heads = hfkv.KVConfig(window=replace(window, global_heads={0: (0,)}))
    moved = hfkv.KVConfig(window=replace(window, sink_positions="cache"))
    said: dict[str, Any] = {}
    for name, kv in (("global_heads", heads), ("sink_positions", moved)):
        said[name] = error_of(lambda kv=kv: hfkv.KVCache(model, kv))  # type: ignore[misc]
        said[f"patched {name}"] = error_of(lambda kv=kv: hfkv.patch(model, kv).undo())  # type: ignore[misc]
    return said


def memory(model: Any, folder: Path) -> dict[str, Any]:
    """Bytes held in this process for 64 tokens of two rows."""
    held = {}
    for name, kv in KV.items():
        with hfkv.patch(model, kv):
            cache = model.hfkv.new_cache()
            model.generate(**inputs(length=60), past_key_values=cache, do_sample=False, max_new_tokens=5)
            held[name] = cache.held_bytes()
    return {"held_bytes": held}


# What is kept within a small budget depends on the bytes of a page, which differ between the stages of a pipeline.
SHARED = {f"reuse {kv}": reuse(f"{kv}+paged+page_size:4", 1 << 20) for kv in ("none", "int8", "window:8+sinks:2")}
EVICTING = {
    f"evicting {kv}": reuse(f"{kv}+paged+page_size:4", budget) for kv, budget in (("none", 20_000), ("int8", 6_000))
}
APART = {
    "memory": memory,
    "learned prefix": learned_prefix,
    "one refuses": one_refuses,
    "others' file": others_file,
    "refusals": refusals,
}
