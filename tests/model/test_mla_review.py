"""What an outsider's review of latent attention found: each of these was once wrong."""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch.utils._pytree import tree_map_only

import hfkv
from hfkv import KVConfig, Window
from hfkv.attention.latent.crossover import forced
from tests import brute_force
from tests.model.test_mla import CLOSE, inputs_for, model_of
from tests.model.test_window import LENGTH, PADS, ids, through_cache
from tests.model.test_window import model_of as windowed_model
from tests.zoo import generate

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Bent(torch.nn.Module):
    """A projection that is no matrix."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(latents))


class Shifting(ModelHook):
    """A hook of accelerate's that changes what comes out."""

    def post_forward(self, module: Any, output: Any) -> Any:
        return output + 0.5


def with_bias(attention: Any) -> None:
    attention.kv_b_proj.bias = torch.nn.Parameter(torch.ones(attention.kv_b_proj.out_features))


def bent(attention: Any) -> None:
    attention.kv_b_proj = Bent(attention.kv_b_proj)


def hooked(attention: Any) -> None:
    attention.kv_b_proj.register_forward_hook(lambda module, args, output: output + 0.5)


def hooked_by_accelerate(attention: Any) -> None:
    add_hook_to_module(attention.kv_b_proj, Shifting())


def replaced(attention: Any) -> None:
    attention.kv_b_proj = torch.nn.Sequential(attention.kv_b_proj)


STRANGE = {change.__name__: change for change in (with_bias, bent, hooked, hooked_by_accelerate, replaced)}


def changed(model: Any, change: Any) -> Any:
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        change(layer.self_attn)
    return model


@pytest.mark.parametrize("change", STRANGE)
def test_a_projection_that_is_no_plain_matrix_is_asked_itself(change: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="hfkv")
    model = changed(model_of("deepseek_v3"), STRANGE[change])
    inputs = inputs_for(model)
    tokens, logits = generate(model, inputs)
    for _ in range(2):
        caplog.clear()
        with hfkv.patch(model):
            ours, our_logits = generate(model, inputs)
        assert torch.equal(ours, tokens)
        torch.testing.assert_close(our_logits, logits, **CLOSE)
        assert caplog.text.count("latents are expanded for every step") == 1  # once a patch


@pytest.mark.parametrize("split", [LENGTH, 5, 1])
@pytest.mark.parametrize("change", STRANGE)
def test_and_under_a_window_too(change: str, split: int) -> None:
    model, kv = changed(windowed_model("deepseek_v3"), STRANGE[change]), KVConfig(window=Window(7, 2))
    with torch.no_grad():
        expected = brute_force.logits(model, ids(), kv, PADS["ragged"])
    ours = through_cache(model, kv, "ragged", split)
    real = torch.arange(LENGTH) >= torch.tensor(PADS["ragged"])[:, None]
    assert (ours - expected)[real].abs().max() <= 1e-5 * expected[real].abs().max()


def test_a_summary_of_latents_that_no_matrix_expands_is_refused() -> None:
    model = changed(windowed_model("deepseek_v3"), bent)
    with pytest.raises(NotImplementedError, match="Leave the summary out"):
        through_cache(model, KVConfig(window=Window(7, 2, summary="mean", summary_page_size=4)), "no padding", 5)


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


@pytest.mark.parametrize("kv", ["none", "int8", "window:64"])
@pytest.mark.parametrize("family", ["deepseek_v3", "minicpm3", "deepseek_v32"])
def test_autocast(family: str, kv: str) -> None:
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


def test_hooks_for_all_modules_are_called() -> None:
    model = model_of("deepseek_v3")
    inputs, kind = inputs_for(model), type(model.model.layers[0].self_attn.kv_b_proj)
    seen = {layer.self_attn.kv_b_proj for layer in model.model.layers}
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 0.5 if isinstance(module, kind) and module in seen else None
    )
    try:
        tokens, _ = generate(model, inputs)
        with hfkv.patch(model):
            assert torch.equal(generate(model, inputs)[0], tokens)
    finally:
        handle.remove()
    assert not torch.equal(generate(model, inputs)[0], tokens)


def halved(attention: Any, *latents: torch.Tensor) -> Any:
    return [states * 0.5 for states in type(attention).expand_kv(attention, *latents)]


def test_an_expansion_of_ones_own_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = copy.deepcopy(model_of("deepseek_v3"))
    for layer in model.model.layers:
        layer.self_attn.expand_kv = functools.partial(halved, layer.self_attn)
    inputs = inputs_for(model)
    tokens, _ = generate(model, inputs)
    with hfkv.patch(model) as handle:
        assert handle.num_latent_layers == 0
        assert torch.equal(generate(model, inputs)[0], tokens)
    assert "of its own" in caplog.text
    assert all("expand_kv" in vars(layer.self_attn) for layer in model.model.layers)


def test_a_subclass_of_an_attention_class_is_known() -> None:
    model = copy.deepcopy(model_of("deepseek_v3"))
    kind: Any = type(model.model.layers[0].self_attn)
    own = type("Own", (kind,), {"forward": lambda self, *args, **kwargs: kind.forward(self, *args, **kwargs)})
    for layer in model.model.layers:
        layer.self_attn.__class__ = own
    with hfkv.patch(model) as handle:
        assert handle.num_latent_layers == len(model.model.layers)


def test_modules_of_another_patched_model_are_refused() -> None:
    one, other = copy.deepcopy(model_of("deepseek_v3")), copy.deepcopy(model_of("deepseek_v3"))
    other.model.layers = one.model.layers
    with hfkv.patch(one), pytest.raises(RuntimeError, match="part of another patched model"):
        hfkv.patch(other)
    assert all("expand_kv" not in vars(layer.self_attn) for layer in one.model.layers)


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
