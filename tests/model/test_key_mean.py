"""The mean that is taken off keys: exact in every mode, and found as it should be."""

from __future__ import annotations

import pytest
import torch

import hfkv
from hfkv import KVConfig, Window
from hfkv.codecs.key_mean import KeyMean
from hfkv.kernels import dispatch
from hfkv.kernels.backend import Asked, Backend, Kernel
from tests import brute_force
from tests.tiny import llama
from tests.windowed import RULES, SPLITS, error, model_of

WINDOWS = [None, Window(6, 2), *RULES]


@pytest.mark.pairwise
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("padding", ["no padding", "ragged"])
@pytest.mark.parametrize("store", ["contiguous", "paged+page_size:16", "paged+page_size:16+offload"])
@pytest.mark.parametrize("codec", ["int4", "int3", "int2", "k:int4+v:int8"])
@pytest.mark.parametrize("rule", range(len(WINDOWS)))
@pytest.mark.parametrize("name", ["llama", "qwen3", "glm4"])
def test_every_mode_equals_brute_force(name: str, rule: int, codec: str, store: str, padding: str, split: str) -> None:
    parsed = KVConfig.parse(f"{codec}+{store}")
    kv = KVConfig(
        codec=parsed.codec,
        window=WINDOWS[rule],
        store="paged" if "paged" in store else "auto",
        page_size=parsed.page_size,
        offload=parsed.offload,
    )
    assert error(name, kv, padding, split, torch.float64) <= 1e-5


@pytest.mark.parametrize("split", SPLITS)
def test_layers_that_slide_by_themselves_have_means_too(split: str) -> None:
    with hfkv.patch(model_of("gemma2", torch.float64), "int4") as handle:
        assert list(handle.key_means) == [0, 1]
    # Rows of padding are NaN in stock float64.
    assert error("gemma2", KVConfig("int4"), "no padding", split, torch.float64) <= 1e-5


@pytest.mark.parametrize("codec", ["int4", "int2"])
@pytest.mark.parametrize("rule", range(4))
def test_kernels_attend_as_to_decoded_tokens(rule: int, codec: str) -> None:
    """One layer of one model: nothing upstream lets a code fall the other way."""
    model = llama(num_hidden_layers=1)
    torch.manual_seed(3)
    ids, pads = torch.randint(5, 90, (3, 300)), torch.tensor([0, 3, 40])
    mask = (torch.arange(300) >= pads[:, None]).long()
    positions = (torch.arange(300) - pads[:, None]).clamp_min(0)
    turned, summary = Window(150, 2, sink_positions="cache"), Window(150, 2, summary="mean", summary_page_size=8)
    kv = KVConfig(codec=codec, window=[None, Window(200, 2), turned, summary][rule])

    def logits(forwards: list[int], decodes: bool) -> torch.Tensor:
        with hfkv.patch(model, kv) as handle, torch.no_grad(), pytest.MonkeyPatch.context() as patching:
            mean = handle.key_means[0]
            vars(handle)["key_means"] = {0: KeyMean(20 * mean.vector, mean.waves)}
            if decodes:
                patching.setattr(dispatch, "BACKENDS", [])
                dispatch.forget_choices()
            cache, parts, first = handle.new_cache(), [], 0
            for count in forwards:
                now = slice(first, first + count)
                given = {"attention_mask": mask[:, : first + count], "position_ids": positions[:, now]}
                parts.append(model(ids[:, now], past_key_values=cache, **given).logits)
                first += count
        dispatch.forget_choices()
        return torch.cat(parts, dim=1)[mask[:, :first] == 1]

    expected = logits([300], True)
    size = expected.abs().max()
    for forwards in ([300], [290] + [1] * 10, [150, 140, 3, 7]):
        assert (logits(forwards, False) - expected).abs().max() <= 2e-5 * size
        assert (logits(forwards, True) - expected).abs().max() <= 2e-5 * size


class Knowing(Backend):
    """A kernel that knows nothing of means."""

    def serves(self, device: torch.device) -> bool:
        return True

    def attention(self, asked: Asked) -> Kernel:
        return Kernel("knowing", "", lambda *args, **kwargs: None)


def test_why_there_is_no_mean_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    with hfkv.patch(model, "int4", graphs=True) as handle:
        assert handle.key_means == {}
        assert "CUDA graphs" in str(handle.no_means)
    with hfkv.patch(model, "int8") as handle:
        assert handle.key_means == {}
        assert handle.no_means is None
    with hfkv.patch(model, "int4+key_mean:off") as handle:
        assert not handle.new_cache().takes_mean
    monkeypatch.setattr(dispatch, "BACKENDS", [Knowing()])
    dispatch.forget_choices()
    with hfkv.patch(model, "int4") as handle:
        assert handle.key_means == {}
        assert "knowing: it knows nothing of a mean" in str(handle.no_means)
    monkeypatch.undo()
    dispatch.forget_choices()
    assert sum("no mean is taken off its keys" in message for message in caplog.messages) == 2


def test_a_mean_is_turned_as_the_model_turns_its_keys() -> None:
    model = model_of("glm4", torch.float64)
    with hfkv.patch(model, "int4") as handle:
        mean = handle.key_means[0]
    where = [0, 1, 7, 300]
    ours = mean.turned(*mean.waves.of(torch.tensor([where]), torch.device("cpu")))[0]
    for head, vector in enumerate(mean.vector.double()):
        theirs = brute_force.turned(model, vector.expand(len(where), -1), where)
        assert (ours[head] - theirs).abs().max() <= 1e-6 * vector.abs().max()
