"""Latent attention by modules unlike the library's own: projections that are no plain matrix, hooks, subclasses."""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

import hfkv
from hfkv import KVConfig, Window
from tests import brute_force
from tests.latent_models import CLOSE, inputs_for, model_of
from tests.windowed import LENGTH, PADS, ids, through_cache
from tests.windowed import model_of as windowed_model
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
def test_a_projection_that_is_no_plain_matrix_is_asked_under_a_window_too(change: str, split: int) -> None:
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
