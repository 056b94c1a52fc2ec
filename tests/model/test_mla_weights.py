"""The weights behind latent attention: adapters, quantised, put away, cast and changed ones."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, get_peft_model
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DeepseekV3Config, DeepseekV3ForCausalLM

import hfkv
from hfkv.attention.latent.crossover import forced
from tests.latent_models import CLOSE, inputs_for, model_of
from tests.zoo import generate

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ADAPTED = {"target_modules": ["kv_b_proj"], "r": 4, "lora_alpha": 16, "init_lora_weights": False}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, logger="hfkv")
    return caplog


def adapted(*names: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(model_of("deepseek_v3")), LoraConfig(**{**ADAPTED, **changes}), names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**{**ADAPTED, **changes}))
    return model.eval()


def outputs(model: Any, kv: str | None, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of stock where `kv` is None."""
    inputs = inputs_for(model_of("deepseek_v3"))
    if kv is None:
        return generate(model, inputs, max_new_tokens=12, **options)
    with hfkv.patch(model, kv):
        return generate(model, inputs, max_new_tokens=12, **options)


def assert_same(model: Any, kv: str = "none", **options: Any) -> torch.Tensor:
    """Patched, the same tokens and logits as stock; returns the tokens."""
    tokens, logits = outputs(model, None, **options)
    ours, our_logits = outputs(model, kv, **options)
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(our_logits, logits, **CLOSE)
    return tokens


def test_adapters_are_applied_as_factors(expansions: Any) -> None:
    model = adapted("one", "two")
    count = expansions(model)
    seen = []
    for active in ("one", "two", ["one", "two"]):
        model.base_model.set_adapter(active)
        seen.append(assert_same(model))
        assert len(set(count.tokens)) == 12  # stock's, one length a step
        del count.tokens[:]
        ours, _ = outputs(model, "none")
        assert torch.equal(ours, seen[-1])
        assert count.tokens == []
    with model.disable_adapter():
        seen.append(assert_same(model))
    assert len({tuple(tokens.flatten().tolist()) for tokens in seen}) == 4
    model.base_model.set_adapter("one")
    model.merge_adapter()
    assert torch.equal(assert_same(model), seen[0])
    model.unmerge_adapter()
    with hfkv.patch(model):  # switched under the patch
        inputs = inputs_for(model_of("deepseek_v3"))
        for active, tokens in zip(("two", "one"), (seen[1], seen[0]), strict=True):
            model.base_model.set_adapter(active)
            assert torch.equal(generate(model, inputs, max_new_tokens=12)[0], tokens)


@pytest.mark.parametrize("kv", ["none", "int8+window:64"])
def test_rows_with_adapters_of_their_own(kv: str, said: Any) -> None:
    model = adapted("one", "two")
    if kv == "none":
        assert_same(model, adapter_names=["two", "one"])
        assert "rows of this batch have adapters of their own" in said.text
        return
    model.double()  # see `llama_for`; not all experts compute in it
    model.get_base_model().set_experts_implementation("eager")
    tokens, _ = outputs(model, "int8", adapter_names=["two", "one"])
    assert torch.equal(outputs(model, kv, adapter_names=["two", "one"])[0], tokens)


def test_rows_with_adapters_of_their_own_under_a_window_that_moves() -> None:
    model, inputs = adapted("one", "two"), inputs_for(model_of("deepseek_v3"))
    with hfkv.patch(model, "window:5+sinks:1"):
        mixed, _ = generate(model, inputs, max_new_tokens=12, adapter_names=["two", "one"])
        for row, name in enumerate(("two", "one")):
            model.base_model.set_adapter(name)
            alone, _ = generate(model, {key: states[[row]] for key, states in inputs.items()}, max_new_tokens=12)
            assert torch.equal(mixed[[row]], alone)


def test_an_adapter_that_is_no_pair_of_factors_switches_the_absorbed_form_off(said: Any) -> None:
    model = adapted("one", use_dora=True)
    assert_same(model)
    assert "is not a plain LoRA" in said.text
    with torch.no_grad():
        wide, narrow = (outputs(model, kv)[0] for kv in ("none", "window:64"))
    assert torch.equal(wide, narrow)


@pytest.mark.parametrize("kv", ["none", "window:64"])
def test_hooks_on_the_projection_are_called(kv: str, said: Any) -> None:
    model = copy.deepcopy(model_of("deepseek_v3"))
    projection = model.model.layers[0].self_attn.kv_b_proj
    projection.register_forward_hook(lambda module, args, output: output * 0.5)
    tokens, _ = outputs(model, None)
    assert torch.equal(outputs(model, kv)[0], tokens)
    assert not torch.equal(outputs(model_of("deepseek_v3"), None)[0], tokens)
    assert "hooks on its kv_b_proj would not be called" in said.text


def test_weights_are_read_when_they_are_used(expansions: Any) -> None:
    model = copy.deepcopy(model_of("deepseek_v3"))
    inputs = inputs_for(model)
    with hfkv.patch(model):
        generate(model, inputs)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.kv_b_proj.weight.mul_(-0.7)
        changed, _ = generate(model, inputs)
        model.to(torch.bfloat16)
        count = expansions(model)
        generate(model, inputs)
        assert count.tokens == []
        model.to(torch.float32)
    with torch.no_grad():
        twin = copy.deepcopy(model_of("deepseek_v3"))
        for layer in twin.model.layers:
            layer.self_attn.kv_b_proj.weight.mul_(-0.7)
    assert torch.equal(outputs(twin, None)[0][:, : changed.shape[1]], changed)


@pytest.mark.parametrize("away", ["host", "disk"])
def test_weights_that_accelerate_has_put_away(away: str, tmp_path: Any, expansions: Any) -> None:
    model = copy.deepcopy(model_of("deepseek_v3"))
    if away == "host":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, str(tmp_path), execution_device="cpu")
    assert model.model.layers[0].self_attn.kv_b_proj.weight.device.type == "meta"
    tokens = assert_same(model)
    count = expansions(model)
    assert torch.equal(outputs(model, "window:64")[0], tokens)
    assert count.tokens == []


def tiny_for_bits() -> Any:
    """bitsandbytes' 4-bit code for CPUs wants widths of whole blocks: 64."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = DeepseekV3ForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def with_plain_projections(model: Any) -> Any:
    """The same model with the numbers of its quantised projections in plain layers, which stock code can expand by.

    bitsandbytes' 8-bit product takes no latents of four dimensions, so that stock code fails.
    """
    twin = copy.deepcopy(model)
    for layer in twin.model.layers:
        quantised = layer.self_attn.kv_b_proj
        plain = torch.nn.Linear(quantised.in_features, quantised.out_features, bias=False)
        with torch.no_grad():
            plain.weight.copy_(quantised(torch.eye(quantised.in_features)).t())
        layer.self_attn.kv_b_proj = plain
    return twin


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_projections(bits: int, tmp_path: Any, expansions: Any) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_for_bits().save_pretrained(tmp_path)
    options: dict[str, Any] = {"bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {}
    model: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **options),
        dtype=torch.float32,
    )
    assert "Linear" in type(model.model.layers[0].self_attn.kv_b_proj).__name__
    inputs = {name: states.clamp_max(98) for name, states in inputs_for(model_of("deepseek_v3")).items()}
    tokens, logits = generate(with_plain_projections(model), inputs, max_new_tokens=12)
    count = expansions(model)
    with hfkv.patch(model), forced("absorbed"):
        ours, our_logits = generate(model, inputs, max_new_tokens=12)
    assert count.tokens == []
    assert torch.equal(ours, tokens)
    # The layers around it multiply in bfloat16 on a CPU: a last bit in their input comes out as 2^-8 of a number.
    torch.testing.assert_close(our_logits, logits, atol=2**-8 * logits.abs().max().item(), rtol=0)
    with hfkv.patch(model):
        generate(model, inputs)  # a prompt that is expanded runs too


def test_lora_with_a_bias_and_hooks_on_its_parts() -> None:
    inputs = inputs_for(model_of("deepseek_v3"))
    options: dict[str, Any] = {"target_modules": ["kv_b_proj"], "r": 4, "init_lora_weights": False}
    for changes in ({"lora_bias": True}, {}):
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(model_of("deepseek_v3")), LoraConfig(**options, **changes)).eval()
        if changes:
            for name, weight in model.named_parameters():
                if "lora_B" in name and "bias" in name:
                    torch.nn.init.normal_(weight)
        else:
            for module in model.modules():
                if hasattr(module, "lora_A"):
                    module.lora_A["default"].register_forward_hook(lambda module, args, output: output * 3)
        tokens, logits = generate(model, inputs)
        with hfkv.patch(model):
            ours, our_logits = generate(model, inputs)
        assert torch.equal(ours, tokens)
        torch.testing.assert_close(our_logits, logits, **CLOSE)


class Halves(torch.Tensor):
    """A weight that is twice what its numbers say, as quantising libraries write theirs: only its products know."""

    @staticmethod
    def __new__(cls, plain: torch.Tensor) -> Halves:
        wrapped = torch.Tensor._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype)
        wrapped.plain = plain
        return wrapped

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            return func(args[0], 2 * args[1].plain)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Halves(args[0].plain)
        return func(*tree_map_only(Halves, lambda weight: weight.plain, args), **(kwargs or {}))


def test_a_weight_of_a_class_of_its_own_is_read_through_its_layer() -> None:
    model = copy.deepcopy(model_of("deepseek_v3"))
    inputs = inputs_for(model)
    tokens, _ = generate(model, inputs)
    for layer in model.model.layers:
        projection = layer.self_attn.kv_b_proj
        projection.weight = torch.nn.Parameter(Halves(projection.weight.detach() / 2), requires_grad=False)
    with hfkv.patch(model), forced("absorbed"), torch.no_grad():
        assert torch.equal(generate(model, inputs)[0], tokens)
