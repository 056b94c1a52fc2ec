"""Keywords of attention functions: what changes a result is implemented or refused, everything else passes."""

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DataCollatorWithFlattening
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.t5.modeling_t5 import T5Attention

import hfkv
from hfkv.attention.function import _UNDERSTOOD, hfkv_attention
from hfkv.models.attention_keywords import OWN_ATTENTION, attention_code
from tests.tiny import llama, prompt

ROOT = Path(transformers.__path__[0])
# What the signature of our attention names.
NAMED = {"scaling", "dropout", "is_causal", "position_bias", "attention_mask"}
# Read by functions for continuous batching, and by sparse attentions, which ours refuses.
REFUSED = {"cache", "block_table", "block_indices", "block_size", "indices", "sinks"}


def _passed() -> dict[str, set[str]]:
    """Every keyword that a modelling file names where it calls an attention function, with the files."""
    found: dict[str, set[str]] = {}
    for path in ROOT.glob("models/*/modeling_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "attention_interface":
                for word in node.keywords:
                    if word.arg is not None:
                        found.setdefault(word.arg, set()).add(path.name)
    return found


@pytest.mark.slow
def test_every_keyword_that_a_modelling_file_passes_is_known() -> None:
    passed = _passed()
    assert len(passed) > 10
    states = {"query", "key", "value"}
    assert set(passed) - _UNDERSTOOD - NAMED - states <= {"sinks", "block_indices", "indices"}
    # The models that pass what is refused keep their own attention.
    keepers = {"sinks": "inkling2", "block_indices": "minimax_m3"}
    for keyword, kind in keepers.items():
        assert kind in OWN_ATTENTION
        assert all(name.startswith(f"modeling_{kind}") for name in passed.get(keyword, ()))


def test_what_transformers_own_functions_read_is_known() -> None:
    keywords = attention_code(LlamaAttention).keywords
    assert {"softcap", "s_aux", "sliding_window", "cu_seq_lens_q", "cache", "block_table", "block_indices"} <= keywords
    assert not {"labels", "streamer", "num_items_in_batch", "return_shared_kv_states", "tokenizer"} & keywords
    # What else they read is what they are given in order, and the tables of continuous batching.
    states = {"query_states", "key_states", "value_states", "k_cache", "v_cache", "query_length", "softmax_scale"}
    states |= {"q", "k", "v", "read_index", "write_index", "max_seqlen_q", "max_seqlen_k"}
    assert keywords - _UNDERSTOOD - NAMED - REFUSED <= states | {"use_top_left_mask"}


def test_what_a_models_own_eager_function_reads_is_known() -> None:
    assert "sinks" not in attention_code(LlamaAttention).keywords
    if importlib.util.find_spec("transformers.models.inkling2") is not None:  # 5.17 has none
        modelling = importlib.import_module("transformers.models.inkling2.modeling_inkling2")
        assert "sinks" in attention_code(modelling.Inkling2SlidingAttention).keywords
    assert "position_bias" in attention_code(T5Attention).keywords
    assert not attention_code(GptOssAttention).has_sdpa
    assert attention_code(LlamaAttention).has_sdpa
    assert attention_code(LlamaAttention).eager is not None


def _called(**kwargs: Any) -> torch.Tensor:
    torch.manual_seed(0)
    module = llama().model.layers[0].self_attn
    query, states = torch.randn(1, 4, 6, 16), torch.randn(2, 1, 2, 6, 16)
    return hfkv_attention(module, query, *states, None, **kwargs)[0]


@pytest.mark.parametrize("name", ["block_table", "block_indices", "cache"])
def test_what_changes_a_result_and_is_not_implemented_is_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"does not implement '{name}', which LlamaAttention passed"):
        _called(**{name: torch.zeros(1)})


@pytest.mark.parametrize(
    "name",
    [
        "labels",
        "streamer",
        "num_items_in_batch",
        "return_shared_kv_states",
        "assistant_model",
        "my_own",
        "max_length_q",
    ],
)
def test_everything_else_passes_and_changes_nothing(name: str) -> None:
    assert torch.equal(_called(**{name: object()}), _called())


def test_beams_with_a_streamer_are_stocks() -> None:
    model, inputs = llama(), prompt()
    given = {"num_beams": 2, "max_new_tokens": 4, "labels": inputs["input_ids"]}
    expected = model.generate(**inputs, **given).tolist()
    with hfkv.patch(model):
        assert model.generate(**inputs, **given).tolist() == expected


TEXTS = [b"import os, sys\n", b"def parse(text):\n    return text\n", b"x"]


def _flattened(with_positions: bool) -> tuple[dict[str, Any], list[dict[str, torch.Tensor]]]:
    rows = [{"input_ids": [3 + byte % 90 for byte in text]} for text in TEXTS]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=False)(rows)
    batch = {name: value if isinstance(value, int) else torch.as_tensor(value) for name, value in batch.items()}
    if not with_positions:
        batch.pop("position_ids")
    return batch, [{"input_ids": torch.tensor([row["input_ids"]])} for row in rows]


@pytest.mark.parametrize("with_positions", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_texts_packed_into_one_row_see_only_their_own(with_positions: bool, grad: bool) -> None:
    # Without positions, those of all texts go on; rotary keys know distances only, so that nothing changes.
    model = llama()
    batch, rows = _flattened(with_positions)
    with hfkv.patch(model), torch.set_grad_enabled(grad):
        packed = model(**batch, use_cache=False).logits
        alone = torch.cat([model(**row, use_cache=False).logits for row in rows], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-3, rtol=1e-3)


def test_packed_texts_in_several_rows_or_behind_a_cache_are_refused() -> None:
    model = llama()
    batch, _ = _flattened(False)
    lengths = {name: batch[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")}
    with hfkv.patch(model), torch.no_grad(), pytest.raises(NotImplementedError, match="pack them into one row"):
        model(input_ids=batch["input_ids"].expand(2, -1), **lengths, use_cache=False)
    with hfkv.patch(model) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(input_ids=batch["input_ids"], past_key_values=cache)
        with pytest.raises(NotImplementedError, match="with those of the cache"):
            model(input_ids=batch["input_ids"], **lengths, past_key_values=cache)
