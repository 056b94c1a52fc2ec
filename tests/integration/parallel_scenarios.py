"""What a model that is spread over processes is asked to do, and a single process as well."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.distributed import DistributedConfig

import hfkv

# How transformers is asked to spread each model.
ASKED: dict[str, dict[str, int]] = {
    "tp-llama": {"tp_size": 2},
    "tp-mixtral": {"tp_size": 2},
    "pp-llama": {"pp_size": 2},
    "pp-sliding": {"pp_size": 2},
    "ep-mixtral": {"tp_size": 2, "ep_size": 2},
}
KV = {"none": "none", "int8": "int8", "window": "window:8+sinks:2", "paged": "paged+page_size:4"}
MODES = ("explicit", "patched")
NEW_TOKENS, VOCAB = 8, 100
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


# transformers 5.17 shares the experts or everything else.
if "ep_size" not in DistributedConfig.__dataclass_fields__:
    ASKED["ep-mixtral"] = {"tp_size": 2, "enable_expert_parallel": True}


def model_of(kind: str) -> Any:
    """A tiny random model for a kind; that of the pipeline has stages of different sizes."""
    torch.manual_seed(0)
    if kind.endswith("mixtral"):
        config = MixtralConfig(**_SHAPE, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2)
        model: Any = MixtralForCausalLM(config)
    elif kind == "pp-sliding":
        layers = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
        config = Qwen2Config(
            **_SHAPE, num_hidden_layers=4, use_sliding_window=True, sliding_window=6, layer_types=layers
        )
        model = Qwen2ForCausalLM(config)
    else:
        layers = {"pp-llama": 3, "assistant": 1}.get(kind, 2)
        model = LlamaForCausalLM(LlamaConfig(**_SHAPE, num_hidden_layers=layers))
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def inputs(rows: int = 2, length: int = 11, padding: int = 0, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random ids `[rows, length]`, the first row with `padding` pad tokens on its left."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[0, :padding] = 0
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def more(text: torch.Tensor, padding: int = 0, count: int = 3) -> dict[str, torch.Tensor]:
    """A text with `count` new tokens behind it."""
    new = torch.randint(3, VOCAB, (len(text), count), generator=torch.Generator().manual_seed(7))
    mask = torch.ones(len(text), text.shape[1] + count, dtype=torch.long)
    mask[0, :padding] = 0
    return {"input_ids": torch.cat((text, new), dim=1), "attention_mask": mask}


class Side:
    """A model with one kind of cache: what a scenario runs on.

    Args:
        model: spread over processes, or not.
        kv: the cache, or None for transformers' own.
        mode: "explicit" gives every call a cache, "patched" leaves that to the patch.
        folder: for files of this process.
    """

    def __init__(self, model: Any, kv: str | None, mode: str, folder: Path) -> None:
        self.model, self.kv, self.mode, self.folder = model, kv, mode, folder

    def cache(self) -> Any:
        """An empty cache for a call, None where the call makes its own."""
        if self.kv is None or self.mode == "patched":
            return None
        return hfkv.KVCache(self.model, self.kv)

    def generate(self, given: dict[str, torch.Tensor], cache: Any = None, **options: Any) -> Any:
        """What `generate` returns, with its cache."""
        cache = self.cache() if cache is None else cache
        greedy = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True}
        return self.model.generate(**given, past_key_values=cache, **{**greedy, **options})


def one_call(given: dict[str, Any], **options: Any) -> Callable[[Side], dict[str, Any]]:
    def run(side: Side) -> dict[str, Any]:
        torch.manual_seed(3)
        return {"tokens": side.generate(inputs(**given), **options).sequences.tolist()}

    return run


def turns(side: Side) -> dict[str, Any]:
    """Another turn on the cache of a left-padded batch."""
    first = side.generate(inputs(padding=3))
    second = side.generate(more(first.sequences, 3), cache=first.past_key_values)
    return {"tokens": second.sequences.tolist(), "seen": second.past_key_values.get_seq_length()}


def forks(side: Side) -> dict[str, Any]:
    """Copies of one prefix that go on by themselves, and one that is cropped."""
    first = side.generate(inputs(rows=1))
    text, cache = first.sequences, first.past_key_values
    forked = side.generate(more(text.expand(2, -1), count=2), cache=_fork(cache, 2), max_new_tokens=4)
    found: dict[str, Any] = {"tokens": forked.sequences.tolist()}
    cropped = _fork(cache, 1)
    try:
        cropped.crop(-2)
    except RuntimeError as error:  # a window has dropped what the rest would see
        return {**found, "cropped": str(error)}
    last = side.generate(more(text[:, :-3], count=2), cache=cropped, max_new_tokens=4)
    return {**found, "cropped": last.sequences.tolist()}


def _fork(cache: Any, copies: int) -> Any:
    if isinstance(cache, hfkv.KVCache):
        return cache.fork(copies)
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(copies)
    return copied


def file(side: Side) -> dict[str, Any]:
    """A cache that is saved, loaded and continued."""
    first = side.generate(inputs(padding=3))
    loaded = first.past_key_values
    if isinstance(loaded, hfkv.KVCache):
        path = side.folder / "cache.safetensors"
        loaded.save(path, side.model)
        loaded = hfkv.KVCache.load(path, side.model)
    return {"tokens": side.generate(more(first.sequences, 3), cache=loaded).sequences.tolist()}


def assisted(side: Side) -> dict[str, Any]:
    """With an assistant that every process has whole."""
    return {"tokens": side.generate(inputs(rows=1), assistant_model=model_of("assistant")).sequences.tolist()}


SCENARIOS: dict[str, Callable[[Side], dict[str, Any]]] = {
    "plain": one_call({}),
    "padded": one_call({"padding": 3}),
    "chunked": one_call({"padding": 3}, prefill_chunk_size=4),
    "beams": one_call({"padding": 3}, num_beams=3),
    "samples": one_call({"padding": 3}, do_sample=True, num_return_sequences=3),
    "lookup": one_call({"rows": 1}, prompt_lookup_num_tokens=3),
    "assisted": assisted,
    "turns": turns,
    "forks": forks,
    "file": file,
}


class Name(NamedTuple):
    """A scenario with a cache."""

    kv: str
    mode: str
    what: str


def names(kind: str) -> list[Name]:
    """Every scenario of a model that is run with several caches."""
    if kind == "pp-sliding":  # stages whose layers are not of one kind
        return [Name(kv, "patched", what) for kv in ("none", "int8") for what in ("padded", "beams", "turns", "lookup")]
    # What an explicit cache is asked to do differs little between models.
    few = set() if kind.endswith("llama") else SCENARIOS.keys() - {"padded", "beams", "turns"}
    return [
        Name(kv, mode, what)
        for kv in KV
        for mode in MODES
        for what in SCENARIOS
        if mode == "patched" or what not in few
    ]


@contextmanager
def side_of(model: Any, kv: str, mode: str, folder: Path) -> Iterator[Side]:
    """The model with a kind of cache, as long as the context lasts."""
    if mode == "patched":
        reuse = "+reuse:1MiB" if kv == "paged" else ""
        with hfkv.patch(model, KV[kv] + reuse):
            yield Side(model, KV[kv], mode, folder)
        return
    before = model.config._attn_implementation
    if kv == "window":
        model.set_attn_implementation("hfkv")
    try:
        yield Side(model, KV[kv], mode, folder)
    finally:
        model.set_attn_implementation(before)
