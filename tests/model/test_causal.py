"""What a mask says holds, whatever the flag of an attention module says."""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as t
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

import hfkv
from hfkv.attention.function import hfkv_attention
from hfkv.attention.masks import CausalMask, FullMask, rule_of
from tests.tiny import llama

SIZES = {"vocab_size": 99, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
SIZES |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64}
TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 3}
TEXT = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def _paligemma() -> Any:
    text = t.GemmaConfig(**TEXT, num_key_value_heads=1, head_dim=8)
    vision = t.SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    return t.PaliGemmaForConditionalGeneration(
        t.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=16, image_token_index=98)
    )


MODELS = {
    "nllb_moe": lambda: t.NllbMoeForConditionalGeneration(
        t.NllbMoeConfig(**SIZES, **TOKENS, num_experts=4, expert_capacity=100, init_std=0.5)
    ),
    "pegasus_x": lambda: t.PegasusXForConditionalGeneration(
        t.PegasusXConfig(**SIZES, **TOKENS, block_size=4, num_global_tokens=2, init_std=0.5)
    ),
    "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(**SIZES, **TOKENS, init_std=0.5)),
    "t5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=3)
    ),
    "paligemma": _paligemma,
    "gemma2": lambda: t.Gemma2ForCausalLM(
        t.Gemma2Config(**TEXT, num_key_value_heads=1, head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
    ),
    "gpt_oss": lambda: t.GptOssForCausalLM(
        t.GptOssConfig(**TEXT, num_key_value_heads=1, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    ),
}


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """A model in stock form, and a patched copy of it."""
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    patched = copy.deepcopy(model)
    if request.param == "paligemma":
        # Stock's sdpa believes the flag of its modules, and lets an unpadded text see its future.
        model.set_attn_implementation("eager")
    with hfkv.patch(patched), torch.no_grad():
        yield model, patched


def _inputs(model: Any, masked: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(5, 97, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :masked] = 0
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids, "attention_mask": mask}
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.randint(5, 97, (2, 5))}


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("masked", [0, 2])
def test_several_tokens_at_once_have_the_logits_of_stock(pair: tuple[Any, Any], masked: int, use_cache: bool) -> None:
    stock, ours = (model(**_inputs(model, masked), use_cache=use_cache).logits for model in pair)
    visible = slice(masked, None) if not pair[0].config.is_encoder_decoder else slice(None)
    torch.testing.assert_close(ours[:, visible], stock[:, visible], atol=1e-5, rtol=1e-5)


def test_no_token_of_the_decoder_sees_those_behind_it(pair: tuple[Any, Any]) -> None:
    model, inputs = pair[1], _inputs(pair[1])
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    whole = model(**inputs, use_cache=False).logits
    inputs[name] = inputs[name].clone()
    inputs[name][:, -1] = 4
    torch.testing.assert_close(model(**inputs, use_cache=False).logits[:, :-1], whole[:, :-1], atol=1e-5, rtol=1e-5)


def test_drafts_of_several_tokens_change_nothing(pair: tuple[Any, Any]) -> None:
    inputs = {"input_ids": _inputs(pair[0])["input_ids"][:1]}
    given = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "prompt_lookup_num_tokens": 3}
    stock, ours = (model.generate(**inputs, **given).tolist() for model in pair)
    assert ours == stock


def test_a_static_cache_longer_than_its_prompt_is_read_up_to_it() -> None:
    model = llama()
    ids = torch.randint(3, 99, (1, 7))
    given = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    expected = model.generate(ids, **given).tolist()
    with hfkv.patch(model):
        assert model.generate(ids, **given).tolist() == expected


def test_a_decoder_made_bidirectional_by_its_config_sees_everything() -> None:
    torch.manual_seed(0)
    config = t.LlamaConfig(**TEXT, is_causal=False)
    model = t.LlamaModel(config).eval()
    ids = torch.randint(3, 99, (1, 7))
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(ids, use_cache=False).last_hidden_state
        model.set_attn_implementation("hfkv")
        torch.testing.assert_close(model(ids, use_cache=False).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


class _Attention(torch.nn.Module):
    """An attention module of which only the flag is looked at."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [1, 6])
def test_the_mask_outdoes_the_flag(flag: bool, is_causal: bool, length: int) -> None:
    config = t.LlamaConfig(**TEXT)
    config._attn_implementation = "hfkv"
    make = create_causal_mask if is_causal else create_bidirectional_mask
    states = {} if not is_causal else {"past_key_values": None}
    mask = make(config=config, inputs_embeds=torch.zeros(2, length, 16), attention_mask=None, **states)
    query, key, value = torch.randn(3, 2, 2, length, 8).unbind(0)
    output, _ = hfkv_attention(_Attention(flag), query, key, value, mask)
    visible = torch.ones(length, length, dtype=torch.bool)
    visible = visible.tril() if is_causal else visible
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, visible)
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_rules_are_read_off_masks_without_writing_them_out() -> None:
    causal, full = CausalMask(2, 5, 5, None, "cpu"), FullMask(2, 5, 5, "cpu")
    assert rule_of(causal, False) == (None, True)
    assert rule_of(full, True) == (None, False)
    assert torch.equal(full.plain(), torch.ones(2, 1, 5, 5, dtype=torch.bool))
    later, padded = CausalMask(2, 2, 5, None, "cpu"), CausalMask(1, 5, 5, torch.tensor([[0, 1, 1, 1, 1]]), "cpu")
    assert rule_of(later, False)[0] is later
    assert rule_of(padded, False)[0] is padded
    assert torch.equal(later[:, :, -1:], torch.ones(2, 1, 1, 5, dtype=torch.bool))


def test_a_window_is_refused_where_tokens_see_those_behind_them() -> None:
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(t.LlamaConfig(**TEXT, is_causal=False)).eval()
    with hfkv.patch(model, "window:4"), torch.no_grad(), pytest.raises(NotImplementedError, match="see what follows"):
        model(torch.randint(3, 99, (1, 7)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_stocks_through_checkpoints(reentrant: bool) -> None:
    grads = []
    for patched in (False, True):
        model = llama().train()
        if patched:
            hfkv.patch(model)
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=reentrant)
        model.enable_input_require_grads()
        ids = torch.arange(3, 17).view(2, 7)
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for ours, stock in zip(*grads, strict=True):
        torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("masked", [0, 2])
def test_a_forward_without_a_cache_compiles_as_one_graph(masked: int) -> None:
    model = llama()
    inputs = {**_inputs(model, masked), "use_cache": False}
    with torch.no_grad():
        expected = model(**inputs).logits
        with hfkv.patch(model):
            compiled = torch.compile(model.forward, fullgraph=True, backend="eager", dynamic=False)
            torch.testing.assert_close(compiled(**inputs).logits[:, masked:], expected[:, masked:])
    torch._dynamo.reset()
