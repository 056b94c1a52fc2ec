"""One process of a model with latent attention that is spread by its heads: stock and patched, side by side.

    torchrun --standalone --nproc-per-node 2 -m tests.integration.parallel_latent FOLDER

FOLDER has the checkpoint; what process R has found goes to FOLDER/R.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MiniCPM3Config, MiniCPM3ForCausalLM
from transformers.distributed import DistributedConfig

import hfkv
from hfkv.attention.latent import view
from hfkv.attention.latent.crossover import forced
from tests.integration.parallel_scenarios import NEW_TOKENS, VOCAB, inputs

KV = ("none", "int8+paged+page_size:4", "window:8+sinks:2")


def latent_model() -> Any:
    """A tiny random model of a family whose `kv_b_proj` tensor parallelism cuts by heads."""
    torch.manual_seed(0)
    config = MiniCPM3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = MiniCPM3ForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def said(model: Any, kv: str | None) -> dict[str, Any]:
    """What a model says, stock where `kv` is None; with a codec stock reads a cache of ours, decoded."""
    given = inputs(padding=3)
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True, "output_logits": True}
    heads: list[int] = []
    if kv is None:
        output = model.generate(**given, **options)
    else:
        num_heads = view._num_heads
        view._num_heads = lambda *args: heads.append(num_heads(*args)) or heads[-1]
        with hfkv.patch(model, kv), forced("absorbed"):
            output = model.generate(**given, **options)
        view._num_heads = num_heads
    logits = torch.stack(output.logits, dim=1).float()
    return {"tokens": output.sequences.tolist(), "logits": logits.tolist(), "heads": sorted(set(heads))}


def main() -> None:
    folder = Path(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    found = {str(kv): said(model, kv) for kv in (None, *KV)}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
