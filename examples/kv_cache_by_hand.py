"""What a KV cache is: the same text decoded without one, with transformers' and with hfkv's, timed in one run.

    python examples/kv_cache_by_hand.py

Prints the numbers of docs/understand/concepts.md.
"""

import statistics
import time

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import DynamicCache

import hfkv
from hfkv import tiny_lm

CONTEXTS = (256, 1024, 4096)
NEW_TOKENS = 24


@torch.inference_mode()
def decode(model, ids, make_cache):
    """Greedy decoding by hand: the new tokens, the seconds of the prefill, of a median step, and the cache."""
    cache = make_cache() if make_cache else None
    tokens, seconds = ids, []
    for _ in range(NEW_TOKENS):
        start = time.perf_counter()
        if cache is None:  # every step computes keys and values of the whole text again
            logits = model(tokens, use_cache=False, logits_to_keep=1).logits
        else:  # every step computes those of the newest token, and reads the others
            logits = model(tokens[:, cache.get_seq_length() :], past_key_values=cache, logits_to_keep=1).logits
        seconds.append(time.perf_counter() - start)
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
    return tokens[0, ids.shape[1] :].tolist(), seconds[0], statistics.median(seconds[1:]), cache


def held(cache):
    """Bytes of keys and values a cache holds."""
    if isinstance(cache, hfkv.KVCache):
        return cache.held_bytes()
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def main():
    model, tokenizer = tiny_lm.load(torch.float32)
    model.set_attn_implementation("hfkv")
    config = model.config
    kinds = {
        "no cache": None,
        "DynamicCache": lambda: DynamicCache(config=config),
        "hfkv none": lambda: hfkv.KVCache(model),
        "hfkv int8": lambda: hfkv.KVCache(model, "int8"),
        "hfkv int4": lambda: hfkv.KVCache(model, "int4"),
    }
    table = Table("context", "cache", "prefill ms", "step ms", "tokens/s", "KV bytes", "bytes a token", "same tokens")
    for context in track(CONTEXTS, "decoding", console=Console(stderr=True)):
        ids = tokenizer(tiny_lm.held_out_text()[: context - NEW_TOKENS], return_tensors="pt").input_ids
        expected = None
        for name, make_cache in kinds.items():
            decode(model, ids[:, :64], make_cache)  # warm up
            tokens, prefill, step, cache = decode(model, ids, make_cache)
            expected = expected or tokens
            size = held(cache) if cache is not None else 0
            table.add_row(
                f"{context:,}",
                name,
                f"{prefill * 1e3:.1f}",
                f"{step * 1e3:.2f}",
                f"{1 / step:.0f}",
                f"{size:,}",
                f"{size / cache.get_seq_length():.0f}" if cache is not None else "0",
                "yes" if tokens == expected else f"first {next(i for i, t in enumerate(tokens) if t != expected[i])}",
            )
    console = Console(width=110)
    console.print(table)
    console.print(
        f"{config.num_hidden_layers} layers, {config.num_attention_heads} query heads, {config.num_key_value_heads} kv "
        f"heads of {config.head_dim}, fp32; {NEW_TOKENS} new tokens; {torch.get_num_threads()} threads; "
        f"torch {torch.__version__}, transformers {transformers.__version__}, hfkv {hfkv.__version__}"
    )


if __name__ == "__main__":
    main()
