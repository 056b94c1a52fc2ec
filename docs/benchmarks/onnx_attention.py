"""One layer's decode attention by hfkv against ONNX Runtime's quantised GroupQueryAttention: milliseconds of one step.

``pip install onnx onnxruntime``, then ``python docs/benchmarks/onnx_attention.py [--context 4096,16384] [--threads 1,2]
[--json FILE]``. Llama-8B's layer (32 query heads, 8 kv heads of 128), one row; update and attention of both, on a CPU.
ONNX Runtime computes in float32 and keeps float32, or int8 and int4 codes with one scale a channel that it is given
beforehand; hfkv scales each token by itself, and its model is in bfloat16. Both take turns; the least of many steps
counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hfkv
from hfkv.attention.function import hfkv_attention

HEADS, KV_HEADS, WIDTH = 32, 8, 128
OURS = ("none", "int8", "int4", "fp8")
# By kind: the tensors' type in ONNX, in numpy, and the bits of a number.
THEIRS = {
    "float32": (TensorProto.FLOAT, np.float32, 32),
    "int8": (TensorProto.INT8, np.int8, 8),
    "int4": (TensorProto.UINT8, np.uint8, 4),
}
SECONDS = 0.3  # of each turn


def onnx_step(kind: str, context: int, threads: int) -> Callable[[], object]:
    """One call of GroupQueryAttention: the last of `context` tokens is written and attends to all, in place."""
    stored, dtype, bits = THEIRS[kind]
    planes = [1, KV_HEADS, context, WIDTH // 2 if bits == 4 else WIDTH]
    sizes: dict[str, tuple[int, list[int]]] = {
        "query": (TensorProto.FLOAT, [1, 1, HEADS * WIDTH]),
        "key": (TensorProto.FLOAT, [1, 1, KV_HEADS * WIDTH]),
        "value": (TensorProto.FLOAT, [1, 1, KV_HEADS * WIDTH]),
        "past_key": (stored, planes),
        "past_value": (stored, planes),
        "seqlens_k": (TensorProto.INT32, [1]),
        "total": (TensorProto.INT32, [1]),
    }
    names, scales = [*sizes], []
    attributes: dict[str, Any] = {"num_heads": HEADS, "kv_num_heads": KV_HEADS}
    if bits < 32:
        names += [*[""] * 5, "k_scale", "v_scale"]
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": bits}
        scale = np.full((1, KV_HEADS, 1, WIDTH), 3 / (2 ** (bits - 1) - 1), np.float32)
        scales = [numpy_helper.from_array(scale, name) for name in ("k_scale", "v_scale")]
    outputs = {"out": sizes["query"], "present_key": sizes["past_key"], "present_value": sizes["past_value"]}
    node = helper.make_node("GroupQueryAttention", names, [*outputs], domain="com.microsoft", **attributes)
    both = ([helper.make_tensor_value_info(name, *size) for name, size in given.items()] for given in (sizes, outputs))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "step", *both, scales), opset_imports=opsets)
    model.ir_version = 10
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    values = {name: generator.standard_normal(size[1]).astype(np.float32) for name, size in sizes.items()}
    for name in ("past_key", "past_value"):
        values[name] = generator.integers(0, 100, planes).astype(dtype)
    values["seqlens_k"], values["total"] = np.array([context - 1], np.int32), np.array([context], np.int32)
    binding = session.io_binding()
    bound = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()}
    for name, value in bound.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output("present_key", bound["past_key"])
    binding.bind_ortvalue_output("present_value", bound["past_value"])
    binding.bind_output("out")
    return lambda: session.run_with_iobinding(binding)


def cache_step(kv: str | None, context: int) -> Callable[[], object]:
    """One token more to hfkv's cache, or to transformers' where `kv` is None, and its attention to all."""
    config = LlamaConfig(
        num_hidden_layers=1, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=WIDTH, hidden_size=4096
    )
    config._attn_implementation = "sdpa"
    module = transformers.models.llama.modeling_llama.LlamaAttention(config, 0).eval()
    cache: Any = DynamicCache(config=config) if kv is None else hfkv.KVCache(config, kv)
    torch.manual_seed(0)
    if kv is not None:
        cache.reserve(context + 10_000)
    states = torch.randn(2, 1, KV_HEADS, context - 1, WIDTH).bfloat16()
    cache.update(*states, 0)
    query = torch.randn(1, HEADS, 1, WIDTH).bfloat16()
    new = torch.randn(2, 1, KV_HEADS, 1, WIDTH).bfloat16()
    attend = sdpa_attention_forward if kv is None else hfkv_attention

    def step() -> None:
        keys, values = cache.update(*new, 0)
        attend(module, query, keys, values, None, scaling=WIDTH**-0.5)
        del keys, values
        cache.crop(-1)

    return step


def least(step: Callable[[], object], seconds: float) -> float:
    """The least milliseconds of a step, of those that fit in so many seconds."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        step()
        best = min(best, (time.perf_counter() - start) * 1e3)
    return best


@torch.no_grad()
def measure(context: int, threads: int, turns: int) -> dict[str, float]:
    """Milliseconds by contender."""
    torch.set_num_threads(threads)
    steps = {f"ONNX Runtime {kind}": onnx_step(kind, context, threads) for kind in THEIRS}
    steps |= {"DynamicCache": cache_step(None, context)}
    steps |= {f"hfkv {kv}": cache_step(kv, context) for kv in OURS}
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(turns):
        for name, step in steps.items():
            best[name] = min(best[name], least(step, SECONDS))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", default="4096,16384", help="tokens, with commas")
    parser.add_argument("--threads", default="1,2", help="threads, with commas")
    parser.add_argument("--turns", type=int, default=4, help="turns of each contender")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    given = parser.parse_args()
    found = [
        {"context": context, "threads": threads, "ms": measure(context, threads, given.turns)}
        for context in map(int, given.context.split(","))
        for threads in map(int, given.threads.split(","))
    ]
    table = Table("contender", *(f"{cell['context']:,} tokens, {cell['threads']} threads" for cell in found))
    for name in found[0]["ms"]:
        kind = name.rpartition(" ")[2]
        cells = []
        for cell in found:
            theirs = cell["ms"].get(f"ONNX Runtime {kind}") if name.startswith("hfkv") else None
            times = "" if theirs is None else f" ({theirs / cell['ms'][name]:.1f} x ONNX Runtime's speed)"
            cells.append(f"{cell['ms'][name]:.2f} ms{times}")
        table.add_row(name, *cells)
    Console(width=150).print(table)
    if given.json:
        versions = {module.__name__: module.__version__ for module in (torch, transformers, onnxruntime, onnx, hfkv)}
        machine = {"machine": platform.machine(), "processor": processor(), "python": platform.python_version()}
        given.json.write_text(json.dumps({"machine": machine, "versions": versions, "cells": found}, indent=1) + "\n")


def processor() -> str:
    """The processor's name, where Linux says it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
