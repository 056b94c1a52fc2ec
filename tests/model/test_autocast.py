"""Under `torch.autocast` the model's own products are rounded, and nothing of ours is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

import hfkv
from hfkv.attention.function import hfkv_attention
from hfkv.cache.layers.layer import KVLayer
from hfkv.codecs import CODECS
from hfkv.experts.implementation import experts_forward
from hfkv.models.fingerprint import fingerprint_of
from hfkv.models.probe import probe_rotary
from tests.latent_models import inputs_for, model_of
from tests.tiny import greedy, llama, prompt
from tests.zoo import generate

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
AUTOCAST = [BF16, FP16]
KINDS = [
    "none",
    "int8",
    "int4",
    "fp8+paged",
    "int4+offload",
    "none+window:9",
    "int4+window:9+sinks:2",
    "int8+window:9+paged",
]


def autocast(dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cpu", dtype or BF16, enabled=dtype is not None)


@pytest.mark.parametrize("to", AUTOCAST)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("codec", CODECS)
def test_codecs_write_and_read_the_same_bits(codec: str, dtype: torch.dtype, to: torch.dtype) -> None:
    x = torch.randn(2, 3, 5000, 24, dtype=FP32).to(dtype)  # so many are encoded in parts
    planes = CODECS[codec].encode(x)
    decoded = CODECS[codec].decode(planes, 24, dtype)
    with autocast(to):
        for plane, expected in zip(CODECS[codec].encode(x), planes, strict=True):
            assert plane.dtype == expected.dtype
            assert torch.equal(plane.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(CODECS[codec].decode(planes, 24, dtype), decoded)


@pytest.mark.pairwise
@pytest.mark.parametrize("num_queries", [1, 20])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (FP32, BF16), (BF16, BF16), (FP32, FP16)])
@pytest.mark.parametrize("kv", KINDS)
def test_attention_is_what_it_is_without_in_the_dtype_that_transformers_returns(
    kv: str, dtypes: tuple[torch.dtype, torch.dtype], num_queries: int
) -> None:
    query, *states = (torch.randn(2, heads, 30, 16, dtype=FP32) for heads in (4, 2, 2))
    # As rotary angles in float32 leave them: queries and keys wider than values.
    query, key, value = (x.to(dtype) for x, dtype in zip((query, *states), (dtypes[0], *dtypes), strict=True))
    module: Any = SimpleNamespace(config=None, is_causal=True, training=False)

    def attend(to: torch.dtype | None) -> torch.Tensor:
        layer = KVLayer(hfkv.KVConfig.parse(kv))
        with autocast(to):
            layer.update(key[:, :, :-num_queries], value[:, :, :-num_queries])
            views = layer.update(key[:, :, -num_queries:], value[:, :, -num_queries:])
            mask = (
                torch.ones(num_queries, 30, dtype=torch.bool).tril(30 - num_queries)[None, None].expand(2, -1, -1, -1)
            )
            return hfkv_attention(module, query[:, :, -num_queries:], *views, None if num_queries == 1 else mask)[0]

    for to in AUTOCAST:
        out = attend(to)
        assert out.dtype == to
        if dtypes[0] == dtypes[1] or "window" not in kv:
            assert torch.equal(out, attend(None).to(to))
        else:  # and where torch alone would refuse to mix them
            exact = attend_all_in(FP32, kv, query, key, value, num_queries)
            assert (out - exact).abs().max() <= 2 * torch.finfo(to).eps * exact.abs().max()


def attend_all_in(dtype: torch.dtype, kv: str, *states: Any) -> torch.Tensor:
    *states, num_queries = states
    query, key, value = (x.to(dtype) for x in states)
    layer = KVLayer(hfkv.KVConfig.parse(kv))
    layer.update(key[:, :, :-num_queries], value[:, :, :-num_queries])
    views = layer.update(key[:, :, -num_queries:], value[:, :, -num_queries:])
    module: Any = SimpleNamespace(config=None, is_causal=True, training=False)
    mask = torch.ones(num_queries, 30, dtype=torch.bool).tril(30 - num_queries)[None, None].expand(2, -1, -1, -1)
    return hfkv_attention(module, query[:, :, -num_queries:], *views, None if num_queries == 1 else mask)[0]


def moe_model(dtype: torch.dtype = FP32) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=99,
        hidden_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize("moe", ["auto", "int8", "int4"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_experts_compute_what_they_compute_without(moe: str, dtype: torch.dtype) -> None:
    model = moe_model(dtype)
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(7, 64, dtype=FP32)
    index = torch.rand(7, 4).topk(2).indices
    weights = torch.rand(7, 2, dtype=FP32)
    with autocast(BF16 if dtype == FP16 else FP16):
        hfkv.patch(model, moe=moe)  # what is written at patch time is no matter of the caller's either
    with torch.no_grad():
        for tokens in (1, 7):
            given = hidden[:tokens], index[:tokens], weights[:tokens]
            expected = experts_forward(experts, *given)
            for to in AUTOCAST:
                with autocast(to):
                    out = experts_forward(experts, *given)
                assert out.dtype == expected.dtype
                assert torch.equal(out, expected)


def test_training_is_transformers_own() -> None:
    for make in (llama, moe_model):
        losses = []
        for patched in (False, True):
            model = make().train()
            if patched:
                hfkv.patch(model)
            ids = prompt()["input_ids"]
            with autocast(BF16):
                loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            losses.append((loss.detach(), [weight.grad for weight in model.parameters()]))
        (stock, stock_grads), (ours, grads) = losses
        assert torch.equal(ours, stock)
        assert all(torch.equal(a, b) for a, b in zip(grads, stock_grads, strict=True) if b is not None)


@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_what_is_found_out_about_a_model_does_not_depend_on_it(dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    found, state = probe_rotary(model), fingerprint_of(model)
    for to in AUTOCAST:
        with autocast(to):
            now, its_state = probe_rotary(model), fingerprint_of(model)
        assert its_state.weights == state.weights
        assert its_state.precision == f"{state.precision} under autocast to {str(to)[6:]}"
        for index, rotary in found.items():
            assert torch.equal(now[index].inv_freq, rotary.inv_freq)


def logits(model: Any, cache: Any, first: torch.dtype | None, then: torch.dtype | None) -> torch.Tensor:
    """Of the last of 14 tokens, the first ten of which were read under another autocast."""
    ids = prompt(2, 14)["input_ids"]
    with torch.no_grad():
        with autocast(first):
            model(ids[:, :10], past_key_values=cache)
        with autocast(then):
            for t in range(10, 14):
                out = model(ids[:, t : t + 1], past_key_values=cache).logits[:, -1]
    return out.float()


@pytest.mark.parametrize(
    ("attention", "kv"),
    [
        *(("hfkv", kv) for kv in ("none", "int8", "int4+paged", "none+window:100", "fp8+offload", "int8+window:4")),
        *(("sdpa", kv) for kv in ("none", "int8", "int4+paged")),
    ],
)
def test_a_cache_that_was_filled_without_goes_on_under_autocast(attention: str, kv: str) -> None:
    model = llama()
    model.set_attn_implementation(attention)
    for to in AUTOCAST:
        without = logits(model, hfkv.KVCache(model, kv), None, None)
        ours = logits(model, hfkv.KVCache(model, kv), None, to)
        model.set_attn_implementation("sdpa")
        exact, stock = (logits(model, DynamicCache(config=model.config), None, then) for then in (None, to))
        model.set_attn_implementation(attention)
        if kv == "none":
            assert (ours - exact).abs().max() <= 2 * (stock - exact).abs().max()
        assert (ours - without).abs().max() <= 0.3 * without.abs().max()  # int4 flips codes here; 3.7 nats were wrong


def test_a_cache_that_was_filled_under_autocast_is_refused_without() -> None:
    model = llama()
    for kv in ("none", "int8"):
        with pytest.raises(ValueError, match=r"holds values of torch.bfloat16 .* go on under the same autocast"):
            logits(model, hfkv.KVCache(model, kv), BF16, None)


@pytest.mark.parametrize("to", AUTOCAST)
def test_generate_with_and_without_a_patch(to: torch.dtype) -> None:
    model, inputs = llama(), prompt(2, 9, 3)
    options: dict[str, dict[str, Any]] = {
        "beams": {"num_beams": 2},
        "chunks": {"prefill_chunk_size": 4},
        "one cache": {},
        "assisted": {"assistant_model": llama()},
    }
    for name, more in options.items():
        given = inputs if name != "assisted" else prompt(1, 9)
        asked = {"return_dict_in_generate": True, "output_logits": True, **more}
        first = []
        for patched in (False, True):
            with autocast(to):
                patch = hfkv.patch(model, "none+paged+reuse" if name == "beams" else "none") if patched else None
                cache = {"past_key_values": patch.new_cache()} if patch and name == "one cache" else {}
                result = greedy(model, given, 4, **asked, **cache)
                if patch:
                    patch.undo()
            first.append(result.logits[0].float())
        error = (first[1] - first[0]).abs().max() / first[0].abs().max()
        assert error <= 8 * torch.finfo(to).eps, name


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_exact_rotary_angles(dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    with hfkv.patch(model, exact_rotary=True):
        rotary, x, positions = model.model.rotary_emb, torch.zeros(1, 1, 1, dtype=dtype), torch.arange(9)[None]
        expected = rotary(x, positions)
        for to in AUTOCAST:
            with autocast(to):
                assert all(torch.equal(a, b) for a, b in zip(rotary(x, positions), expected, strict=True))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_on_experts_and_a_learned_prefix() -> None:
    on_experts = {
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "init_lora_weights": False,
    }
    for make, config in (
        (moe_model, LoraConfig(r=4, target_modules=["q_proj"], **on_experts)),
        (llama, PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    ):
        model = get_peft_model(make(), config).eval()
        for to in AUTOCAST:
            asked = {"return_dict_in_generate": True, "output_logits": True}
            with autocast(to):
                stock = greedy(model, prompt(), 3, **asked).logits[0].float()
                with hfkv.patch(model, moe="auto" if make is moe_model else None):
                    ours = greedy(model, prompt(), 3, **asked).logits[0].float()
            assert (ours - stock).abs().max() <= 8 * torch.finfo(to).eps * stock.abs().max()


@pytest.mark.parametrize("kv", ["none", "int8", "window:64"])
@pytest.mark.parametrize("family", ["deepseek_v3", "minicpm3", "deepseek_v32"])
def test_latents_under_autocast_stay_near_stock_attention(family: str, kv: str) -> None:
    if family == "deepseek_v32" and kv != "none":
        pytest.skip("takes no window; covered by the others")
    model = model_of(family)
    inputs = inputs_for(model)
    with torch.autocast("cpu", torch.bfloat16):
        cache = None if kv != "int8" else hfkv.KVCache(model, kv)
        _, logits = generate(model, inputs, past_key_values=cache, max_new_tokens=3)
        with hfkv.patch(model, kv):
            _, ours = generate(model, inputs, max_new_tokens=3)
    assert (ours - logits)[:, 0].abs().max() <= 2**-5 * logits.abs().max()
