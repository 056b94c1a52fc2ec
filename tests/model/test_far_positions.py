"""`patch(model, exact_rotary=True)`: rotary angles exact at any position."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules

import hfkv
from hfkv.models.probe import decoder_of
from tests.tiny import greedy, llama, prompt
from tests.zoo.named import NAMED

FAR = 10**6
POSITIONS = [10, 10_000, FAR + 3, 3 * 10**7 + 1]
ROTARY_MODELS = ["llama", "glm4", "gemma3"]  # half-split; interleaved and partial; two sets of frequencies


def waves(model: Any, positions: list[int], dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    """For each set of frequencies: cos and sin of the model's rotary module, and both as float64 has them."""
    (rotary,) = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    x, ids = torch.zeros(1, 1, 1, dtype=dtype), torch.tensor([positions])
    results = []
    for name, inv_freq in rotary.named_buffers():
        if name.endswith("original_inv_freq"):
            continue
        layer_type = name.removesuffix("inv_freq").rstrip("_")
        cos, sin = rotary(x, ids, **({"layer_type": layer_type} if layer_type else {}))
        angles = torch.tensor(positions, dtype=torch.float64)[:, None] * inv_freq.double()
        angles = torch.cat((angles, angles), dim=-1)[None]
        results.append({"cos": cos, "sin": sin, "true cos": angles.cos(), "true sin": angles.sin()})
    return results


def error(model: Any, positions: list[int]) -> float:
    """The largest error of any cos or sin."""
    found = waves(model, positions)
    return max(
        (wave[name].double() - wave[f"true {name}"]).abs().max().item() for wave in found for name in ("cos", "sin")
    )


def logits(model: Any, offset: int = 0) -> torch.Tensor:
    ids = prompt()["input_ids"]
    positions = torch.arange(ids.shape[1]).expand_as(ids) + offset
    with torch.no_grad():
        return model(input_ids=ids, position_ids=positions).logits


def attributes(model: Any) -> list[tuple[str, Any]]:
    return [(name, set(vars(module))) for name, module in model.named_modules()]


@pytest.mark.smoke
@pytest.mark.parametrize("name", ROTARY_MODELS)
def test_cos_and_sin_are_exact_at_any_position(name: str) -> None:
    model = NAMED[name]().model
    assert error(model, [10]) < 1e-6
    assert error(model, [FAR + 3]) > 1e-3
    with hfkv.patch(model, exact_rotary=True) as handle:
        assert handle.exact_rotary
        assert len(waves(model, POSITIONS)) == (2 if name == "gemma3" else 1)
        assert error(model, POSITIONS) <= 1e-6
    assert error(model, [FAR + 3]) > 1e-3


@pytest.mark.smoke
@pytest.mark.parametrize("name", ROTARY_MODELS)
def test_far_logits_are_those_near_the_start(name: str) -> None:
    model = NAMED[name]().model
    near = logits(model)
    stock = (logits(model, FAR) - near).abs().max()
    with hfkv.patch(model, exact_rotary=True):
        torch.testing.assert_close(logits(model), near, atol=1e-4, rtol=0)
        ours = (logits(model, FAR) - near).abs().max()
    assert ours < 1e-4
    assert stock > 10 * ours
    assert stock > 1e-3


@pytest.mark.parametrize("name", ["llama", "olmo", "cohere2", "gpt_oss"])
def test_half_precision_is_rounded_where_stock_rounds(name: str) -> None:
    model = NAMED[name]().model
    stock = waves(model, [0, 3], torch.bfloat16)
    with hfkv.patch(model, exact_rotary=True):
        for ours, theirs in zip(waves(model, [0, 3], torch.bfloat16), stock, strict=True):
            for wave in ("cos", "sin"):
                assert ours[wave].dtype == theirs[wave].dtype == (torch.float32 if name == "olmo" else torch.bfloat16)
                torch.testing.assert_close(ours[wave], theirs[wave])


def test_the_scaling_of_yarn_is_kept() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 64}
    model = llama(rope_parameters=yarn)
    (stock,) = waves(model, [0, 3])
    assert stock["cos"][0, 0, 0] > 1.1
    with hfkv.patch(model, exact_rotary=True):
        (ours,) = waves(model, [0, 3])
        torch.testing.assert_close(ours["cos"], stock["cos"], atol=1e-6, rtol=0)
        torch.testing.assert_close(ours["sin"], stock["sin"], atol=1e-6, rtol=0)


@pytest.mark.smoke
@pytest.mark.parametrize("kv", [None, "window:64"])
def test_generate_and_undo(kv: str | None) -> None:
    model = llama()
    before, near = attributes(model), logits(model)
    with hfkv.patch(model, kv) as handle:
        assert not handle.exact_rotary
        plain = greedy(model, prompt(), new_tokens=80)
    with hfkv.patch(model, kv, exact_rotary=True):
        assert attributes(model) != before
        assert torch.equal(greedy(model, prompt(), new_tokens=80), plain)
    assert attributes(model) == before
    assert torch.equal(logits(model), near)


def test_copies_carry_the_patch_and_their_own_undo() -> None:
    model = llama()
    hfkv.patch(model, exact_rotary=True)
    copied = copy.deepcopy(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    hfkv.unpatch(model)
    assert error(model, [FAR + 3]) > 1e-3
    for other in (copied, torch.load(saved, weights_only=False)):
        # It reads its own frequencies, not those of the model it was copied from.
        other.model.rotary_emb.inv_freq.mul_(0.5)
        assert other.hfkv.exact_rotary
        assert error(other, POSITIONS) <= 1e-6
        hfkv.unpatch(other)
        assert "forward" not in vars(other.model.rotary_emb)
        assert error(other, [FAR + 3]) > 1e-3


def test_a_model_with_hooks_of_accelerate() -> None:
    model = cpu_offload(llama(), torch.device("cpu"), offload_buffers=False)
    before = attributes(model)
    with hfkv.patch(model, exact_rotary=True):
        assert error(model, POSITIONS) <= 1e-6
    assert attributes(model) == before
    assert error(model, [FAR + 3]) > 1e-3
    remove_hook_from_submodules(model)
    assert error(model, [FAR + 3]) > 1e-3


def test_what_cannot_be_exact_is_refused_and_left_as_it_was() -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    refused = {
        r"LlamaForCausalLM .* change as the text grows \(rope_type 'dynamic'\)": llama(rope_parameters=dynamic),
        "GPT2LMHeadModel .* no rotary module": NAMED["gpt2"]().model,
        r"Qwen2VLForConditionalGeneration .* several axes \(mrope_section\)": NAMED["qwen2_vl"]().model,
    }
    for reason, model in refused.items():
        before = attributes(model)
        with pytest.raises(ValueError, match=f"{reason}.*; leave exact_rotary out"):
            hfkv.patch(model, exact_rotary=True)
        assert attributes(model) == before


def test_a_rotary_module_that_does_something_else_is_refused() -> None:
    model = llama()
    rotary = decoder_of(model).rotary_emb

    class Complex(type(rotary)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            angles = position_ids[..., None].float() * self.inv_freq
            return torch.polar(torch.ones_like(angles), angles)

    class Shifted(type(rotary)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
            return super().forward(x, position_ids + 1)

    class Other(type(rotary)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> Any: ...

    for kind in (Complex, Shifted, Other):
        rotary.__class__ = kind
        before = attributes(model)
        with pytest.raises(ValueError, match=rf"{kind.__name__} cannot take exact_rotary: its forward does not give"):
            hfkv.patch(model, exact_rotary=True)
        assert attributes(model) == before


@pytest.mark.gpu
def test_exact_on_a_gpu() -> None:
    model = llama().cuda()
    with hfkv.patch(model, exact_rotary=True):
        cos, sin = model.model.rotary_emb(torch.zeros(1, 1, 1).cuda(), torch.tensor([POSITIONS]).cuda())
        angles = torch.tensor(POSITIONS, dtype=torch.float64)[:, None] * model.model.rotary_emb.inv_freq.cpu().double()
        assert (cos[0].cpu() - torch.cat((angles, angles), -1).cos()).abs().max() <= 1e-6
        assert (sin[0].cpu() - torch.cat((angles, angles), -1).sin()).abs().max() <= 1e-6
