"""`Rotary`, and what `probe_rotary` finds in the models of every day."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import hfkv
from hfkv.models.probe import probe_rotary
from hfkv.models.rotary import Rotary
from tests.tiny import llama
from tests.zoo.models import instantiate
from tests.zoo.named import _DECODER, NAMED

FAR = 10**6
# name: (rotated dims, interleaved) of each plain full layer, or None where its keys have no position.
FOUND: dict[str, dict[int, tuple[int, bool] | None]] = {
    "llama": {0: (16, False), 1: (16, False)},
    "mistral": {},
    "qwen2": {0: (16, False), 1: (16, False)},
    "qwen3": {0: (16, False), 1: (16, False)},
    "gemma2": {1: (16, False)},
    "gemma3": {1: (16, False)},
    "phi": {0: (8, False), 1: (8, False)},
    "phi3": {0: (16, False), 1: (16, False)},
    "gpt_neox": {0: (4, False), 1: (4, False)},
    "olmo": {0: (16, False), 1: (16, False)},
    "olmo2": {0: (16, False), 1: (16, False)},
    "granite": {0: (16, False), 1: (16, False)},
    "stablelm": {0: (4, False), 1: (4, False)},
    "starcoder2": {},
    "cohere2": {1: None},
    "glm4": {0: (8, True), 1: (8, True)},
    "mixtral": {0: (16, False), 1: (16, False)},
    "qwen3_moe": {0: (16, False), 1: (16, False)},
    "gpt_oss": {1: (16, False)},
    "qwen3_next": {1: (4, False)},
    "falcon": {0: (16, False), 1: (16, False)},
    "llava": {0: (16, False), 1: (16, False)},
    "mllama": {0: (16, False)},
    "deepseek_v3": {0: (16, False), 1: (16, False)},
}
REFUSED = {
    "gpt2": "layer 0: its keys depend on positions in a way",
    "opt": "layer 0: its keys depend on positions in a way",
    "bloom": "BloomModel takes no position_ids",
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
    "whisper": "encoder-decoder",
    "qwen2_vl": "several axes",
}


def tiny(kind: str, **changes: Any) -> Any:
    """A model of a kind left out of `NAMED`, or of other settings."""
    config = getattr(transformers, f"{kind}Config")(**{**_DECODER, **changes})
    return instantiate(getattr(transformers, f"{kind}ForCausalLM"), config)


def keys_at(model: Any, position: int, layer: int) -> torch.Tensor:
    """The keys `[1, H, 1, D]` of a token at a position, by the model alone."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([[40]]), position_ids=torch.tensor([[position]]), past_key_values=cache)
    return cache.layers[layer].keys


def reference(states: torch.Tensor, rotary: Rotary, by: float) -> torch.Tensor:
    """The rotation a pair at a time, as complex numbers."""
    result = states.clone()
    width = 2 * len(rotary.inv_freq)
    for i, frequency in enumerate(rotary.inv_freq.tolist()):
        first, second = (2 * i, 2 * i + 1) if rotary.interleaved else (i, i + width // 2)
        pair = torch.complex(states[..., first], states[..., second])
        pair = pair * torch.polar(
            torch.ones((), dtype=torch.float64), torch.tensor(by * frequency, dtype=torch.float64)
        )
        result[..., first], result[..., second] = pair.real, pair.imag
    return result


def rotary(num_pairs: int, interleaved: bool) -> Rotary:
    return Rotary(10_000.0 ** -(torch.arange(num_pairs, dtype=torch.float64) / num_pairs), interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("num_pairs", [2, 8])
def test_rotate_turns_the_first_dims_and_keeps_the_others(num_pairs: int, interleaved: bool) -> None:
    states = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    for by in (-7, 0, 1, FAR, 3.5):
        turned = rotary(num_pairs, interleaved).rotate(states, torch.tensor(by))
        torch.testing.assert_close(turned, reference(states, rotary(num_pairs, interleaved), by), atol=1e-8, rtol=0)
        assert torch.equal(turned[..., 2 * num_pairs :], states[..., 2 * num_pairs :])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (5,), (1, 5), (2, 1, 1), (2, 1, 5)])
def test_rotate_takes_positions_of_any_shape_and_keeps_the_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    states, by = torch.randn(2, 3, 5, 16).to(dtype), torch.randint(-FAR, FAR, shape)
    turned = rotary(4, False).rotate(states, by)
    assert turned.shape == states.shape
    assert turned.dtype == dtype
    row, token = by.expand(2, 1, 5)[1, 0, 2].item(), states[1:, :, 2:3]
    assert torch.equal(turned[1:, :, 2:3], rotary(4, False).rotate(token, torch.tensor(row)))


@settings(deadline=None, max_examples=30)
@given(first=st.integers(-FAR, FAR), second=st.integers(-FAR, FAR), interleaved=st.booleans())
def test_two_rotations_are_one_by_their_sum(first: int, second: int, interleaved: bool) -> None:
    states = torch.randn(1, 2, 3, 16)
    turn = rotary(6, interleaved).rotate
    twice = turn(turn(states, torch.tensor(first)), torch.tensor(second))
    torch.testing.assert_close(twice, turn(states, torch.tensor(first + second)), atol=5e-6, rtol=0)


@pytest.mark.parametrize("name", NAMED)
def test_the_named_architectures(name: str) -> None:
    model = NAMED[name]().model
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]) as refusal:
            probe_rotary(model)
        assert str(refusal.value).endswith('; use sink_positions="absolute" and no summary')
        return
    found = probe_rotary(model)
    print(name, found)
    assert {i: turn and (2 * len(turn.inv_freq), turn.interleaved) for i, turn in found.items()} == FOUND[name]
    part = "value" if name == "deepseek_v3" else "key"  # of latents the rotated part is cached as values
    assert {turn.part for turn in found.values() if turn} <= {part}


@pytest.mark.parametrize("name", ["llama", "glm4", "gemma3", "gpt_oss", "phi", "granite"])
def test_rotate_moves_keys_as_the_model_does(name: str) -> None:
    model = NAMED[name]().model
    for layer, found in probe_rotary(model).items():
        assert found is not None
        assert found.inv_freq.dtype == torch.float64
        for start, shift, atol in ((3, 40, 1e-5), (90, -90, 1e-5), (7, 2_000, 2e-3)):
            moved = found.rotate(keys_at(model, start, layer), torch.tensor(shift))
            torch.testing.assert_close(moved, keys_at(model, start + shift, layer), atol=atol, rtol=0)
        # Further on stock angles are off, and exact ones are not.
        with hfkv.patch(model, exact_rotary=True):
            moved = found.rotate(keys_at(model, 7, layer), torch.tensor(FAR))
            torch.testing.assert_close(moved, keys_at(model, 7 + FAR, layer), atol=1e-5, rtol=0)


def test_gemma3_full_layers_turn_at_the_global_base() -> None:
    model = NAMED["gemma3"]().model
    found = probe_rotary(model)[1]
    assert found is not None
    expected = 1_000_000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)
    torch.testing.assert_close(found.inv_freq, expected, atol=1e-7, rtol=1e-6)


def test_architectures_beside_the_named_ones() -> None:
    found = probe_rotary(tiny("Mistral", sliding_window=None))
    assert all(turn is not None and len(turn.inv_freq) == 8 and not turn.interleaved for turn in found.values())
    found = probe_rotary(tiny("Cohere"))
    assert all(turn is not None and len(turn.inv_freq) == 8 and turn.interleaved for turn in found.values())
    found = probe_rotary(tiny("SmolLM3", no_rope_layers=[1, 0], layer_types=["full_attention"] * 2))
    assert found[0] is not None
    assert found[1] is None
    backwards = probe_rotary(tiny("NanoChat"))[0]
    assert backwards is not None
    assert backwards.inv_freq[0] == -1


def test_a_norm_after_the_rotation_is_refused() -> None:
    model = tiny("HunYuanDenseV1")
    assert probe_rotary(model)[0] is not None
    with torch.no_grad():
        model.model.layers[1].self_attn.key_layernorm.weight.uniform_(0.5, 1.5)
    with pytest.raises(ValueError, match="'hunyuan_v1_dense', layer 1: its keys depend on positions in a way"):
        probe_rotary(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_a_few_huge_dims(dtype: torch.dtype) -> None:
    model = NAMED["qwen2"]().model
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.bias[7] = 400
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    found = probe_rotary(model)
    assert all(turn is not None and len(turn.inv_freq) == 8 and not turn.interleaved for turn in found.values())


def test_many_layers_of_experts_and_sinks_in_half_precision() -> None:
    # Without `_Recorder`, rounding reaches the sinks, flips experts and makes rows differ from layer 3 on.
    model = tiny("GptOss", num_hidden_layers=12, num_local_experts=16, num_experts_per_tok=4).to(torch.bfloat16)
    found = probe_rotary(model)
    assert len(found) == 6
    assert None not in found.values()


def test_frequencies_that_change_are_refused() -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    with pytest.raises(ValueError, match=r"'llama': its rotary frequencies change as the text grows .*'dynamic'"):
        probe_rotary(llama(rope_parameters=dynamic))
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
    longrope = {"rope_type": "longrope", "rope_theta": 10_000.0, **factors}
    with pytest.raises(ValueError, match="'longrope'"):
        probe_rotary(tiny("Phi3", rope_parameters=longrope))
    model = NAMED["gemma3"]().model
    model.config.rope_parameters["full_attention"]["rope_type"] = "dynamic"
    with pytest.raises(ValueError, match="'dynamic'"):
        probe_rotary(model)


def test_alibi_is_refused() -> None:
    fields = {name: value for name, value in _DECODER.items() if name != "head_dim"}
    config = transformers.FalconConfig(**fields, alibi=True)
    with pytest.raises(ValueError, match="alibi"):
        probe_rotary(instantiate(transformers.FalconForCausalLM, config))


def test_the_model_is_left_as_it_was() -> None:
    model = llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, inputs: (inputs[0],))

    def state() -> list[Any]:
        return [(name, module.training, dict(vars(module))) for name, module in model.named_modules()]

    before, config, weights = state(), model.config.to_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    assert None not in probe_rotary(model).values()
    assert state() == before
    assert model.config.to_dict() == config
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
def test_models_as_they_come_wrapped() -> None:
    peft = pytest.importorskip("peft")
    expected = probe_rotary(llama())[1]
    assert expected is not None
    tuned = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["k_proj"], init_lora_weights=False))
    offloaded = cpu_offload(llama(), torch.device("cpu"))
    ours = llama()
    ours.set_attn_implementation("hfkv")
    patched = llama()
    hfkv.patch(patched, "int8")
    for model in (tuned, tuned.get_base_model(), offloaded, ours, patched):
        found = probe_rotary(model)[1]
        assert found is not None
        assert torch.equal(found.inv_freq, expected.inv_freq)
        assert found.interleaved == expected.interleaved


def test_what_is_found_outlives_inference_mode() -> None:
    with torch.inference_mode():
        found = probe_rotary(llama())[0]
    assert found is not None
    assert not found.inv_freq.is_inference()
    states = torch.randn(1, 2, 3, 16, requires_grad=True)
    found.rotate(states, torch.tensor(5)).sum().backward()
    assert states.grad is not None
