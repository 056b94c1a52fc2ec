"""Keys of one codec and values of another: what a cache of them holds and shows, and who may read it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import hfkv
from hfkv import KVCache
from hfkv.cli.doctor.layers import describe_layers
from hfkv.codecs import CODECS, Codecs
from hfkv.kernels.backend import Asked, Backend, Kernel
from hfkv.kernels.cpu.expanded import expanded_attention
from hfkv.kernels.dispatch import (
    append_kernel,
    attention_kernel,
    expanded_kernel,
    forget_choices,
    latent_kernel,
)
from hfkv.kernels.inputs import Encoded
from hfkv.kernels.latent_naive import latent_attention_naive
from hfkv.kernels.merge import Attended
from hfkv.kernels.naive import append_naive, attention_naive
from hfkv.planning.recommendation import least_lossy_codecs
from tests.latent_models import model_of
from tests.registered import registered
from tests.tiny import feed, greedy, llama, llama_config, prompt, states

CPU = torch.device("cpu")
PAIR = "k:int8+v:int4"


def test_codecs_have_the_name_of_both() -> None:
    codecs = Codecs.named(PAIR)
    assert (codecs.key.name, codecs.value.name, codecs.name) == ("int8", "int4", PAIR)
    assert (codecs.of("key"), codecs.of("value")) == (CODECS["int8"], CODECS["int4"])
    assert (codecs.is_pair, codecs.is_lossless, codecs.loss_percent) == (True, False, None)
    one = Codecs.named("int8")
    assert (one.name, one.is_pair, one.loss_percent) == ("int8", False, CODECS["int8"].loss_percent)
    assert PAIR not in least_lossy_codecs()
    again = pickle.loads(pickle.dumps(codecs))
    assert (again.name, again.is_pair) == (PAIR, True)


@pytest.mark.parametrize("kv", [PAIR, "k:none+v:int8+paged+page_size:4", "k:int4+v:none+window:6+sinks:2"])
def test_bits_are_the_same_whole_in_chunks_and_token_by_token(kv: str) -> None:
    keys, values = torch.randn(2, 2, 2, 13, 16)
    held = []
    for splits in ([13], [5, 4, 4], [1] * 13):
        cache = KVCache(llama_config(num_hidden_layers=1), kv)
        for new_keys, new_values in zip(keys.split(splits, 2), values.split(splits, 2), strict=True):
            cache.update(new_keys, new_values, 0)
        held.append(cache.layers[0].contents())
    counts = [contents.tokens[0].shape[2] for contents in held]
    for contents in held[1:]:
        for plane, other in zip(contents.tokens, held[0].tokens, strict=True):
            newest = min(counts)
            assert torch.equal(*(part[:, :, -newest:].contiguous().view(torch.uint8) for part in (plane, other)))


@pytest.mark.parametrize("store", ["", "+paged+page_size:4"])
@pytest.mark.parametrize("codec", ["k:none+v:int8", "k:int8+v:none", PAIR])
def test_what_is_shown_is_each_codecs_own(codec: str, store: str) -> None:
    cache, codecs = KVCache(llama_config(num_hidden_layers=1), codec + store), Codecs.named(codec)
    new = states(2, 9), states(2, 9)
    shown = cache.update(*new, 0)
    decoded = [
        each.decode(each.encode(x), 16, x.dtype) for each, x in zip((codecs.key, codecs.value), new, strict=True)
    ]
    for view, expected in zip(shown, decoded, strict=True):
        assert torch.equal(view[:, :, 2:5] + 0, expected[:, :, 2:5])
        assert torch.equal(view.transpose(1, 2).flatten(2), expected.transpose(1, 2).flatten(2))
    layer = cache.layers[0]
    kept = layer.keys, layer.values
    cache.crop(-9)
    cache.update(*(-x for x in new), 0)
    for tensor, expected in zip(kept, decoded, strict=True):
        assert torch.equal(tensor, expected), "what was read changes with the cache"
    if not codecs.value.is_lossless:
        with pytest.raises(RuntimeError, match="would be lost"):
            cache.update(*(x[:, :, :1] for x in new), 0)[1].zero_()


@pytest.mark.parametrize("kv", [PAIR, "k:int4+v:int8", "k:none+v:int4", "k:int4+v:none", "k:fp8+v:none"])
def test_the_attention_is_that_of_stock_over_the_decoded_view(kv: str) -> None:
    model, inputs = llama(), prompt(padding=3)
    options = {"output_logits": True, "return_dict_in_generate": True}
    expected = greedy(model, inputs, past_key_values=KVCache(model, kv), **options)
    with hfkv.patch(model, f"{kv}+key_mean:off"):
        ours = greedy(model, inputs, **options)
        beams = greedy(model, inputs, num_beams=3)
        forked = model.hfkv.new_cache()
        model(**inputs, past_key_values=forked)
        twin = copy.deepcopy(forked)
        assert torch.equal(twin.layers[1].keys, forked.layers[1].keys)
    assert torch.equal(beams, greedy(model, inputs, num_beams=3, past_key_values=KVCache(model, kv)))
    assert torch.equal(ours.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


class Naive(Backend):
    """Attends by the naive twins; says of pairs what it is told to."""

    def __init__(self, takes_pairs: bool) -> None:
        self.takes_pairs, self.calls = takes_pairs, set[tuple[str, str, str]]()
        self.asked = set[tuple[str, ...]]()

    def serves(self, device: torch.device) -> bool:
        return True

    def attention(self, asked: Asked) -> Kernel:
        self.asked.add(tuple(codec.name for codec in asked.codecs))
        return self._kernel(attention_naive)

    def latent(self, asked: Asked) -> Kernel:
        return self._kernel(latent_attention_naive)

    def expanded(self, dtype: torch.dtype) -> Kernel:
        return self._kernel(expanded_attention)

    def append(self, asked: Asked) -> Kernel:
        return self._kernel(append_naive)

    def _kernel(self, twin: Any) -> Kernel:
        def run(*given: Any, **more: Any) -> Any:
            keys, values = (part for part in given if isinstance(part, Encoded))
            self.calls.add((twin.__name__, keys.codec.name, values.codec.name))
            more.pop("inputs", None)
            found = twin(*given, **more)
            return found and Attended(found[0].to(given[0].dtype), found[1])

        return Kernel("naive", "for a test", run, **({"takes_pairs": True} if self.takes_pairs else {}))


@pytest.mark.parametrize("takes_pairs", [False, True])
def test_a_backend_is_given_pairs_only_if_it_takes_them(takes_pairs: bool) -> None:
    model, latent = llama(), model_of("deepseek_v3")
    with registered(Naive(takes_pairs)) as backend:
        for kv in ("int8", PAIR):
            with hfkv.patch(model, kv):
                greedy(model, prompt(length=40), 2)
            with hfkv.patch(latent, kv):
                greedy(latent, prompt(length=40), 2)
        names = {kernel(PAIR, torch.float32, CPU, 1, (16, 16)).name for kernel in (attention_kernel, latent_kernel)}
        names |= {append_kernel(PAIR, torch.float32, CPU, (16, 16)).name}
        names |= {expanded_kernel(torch.float32, CPU, is_pair=True).name}
    twins = {name for name, *_ in backend.calls}
    assert {"attention_naive", "append_naive"} <= twins
    assert twins & {"latent_attention_naive", "expanded_attention"}
    pairs = {(key, value) for _, key, value in backend.calls if key != value}
    assert pairs == ({("int8", "int4")} if takes_pairs else set())
    assert ("naive" in names) == takes_pairs
    assert ("int8", "int4") in backend.asked


def test_where_no_backend_takes_pairs_tokens_are_decoded_and_the_reason_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hfkv.kernels.dispatch.BACKENDS", [Naive(False)])
    forget_choices()
    try:
        kernel = attention_kernel(PAIR, torch.float32, CPU, 1, (16, 16))
        assert (kernel.name, kernel.run) == ("decode + sdpa", None)
        assert kernel.reason == "naive: keys and values must be of one codec, and these are of two"
        kernel = attention_kernel("k:int8+v:int9", torch.float32, CPU, 1, (16, 16))
        assert kernel.reason == f"no codec 'int9' is registered; there are {', '.join(CODECS)}"
    finally:
        forget_choices()


def test_doctor_names_the_kernels_of_a_pair() -> None:
    report = describe_layers("a model", llama_config(), PAIR, torch.float32, CPU)
    (group,) = report.groups
    kernels = {use.name: use.kernel for use in group.uses}
    assert PAIR in group.cache
    assert kernels["decode"] == attention_kernel(PAIR, torch.float32, CPU, 1, (16, 16)).name
    assert kernels["append"] == append_kernel(PAIR, torch.float32, CPU, (16, 16)).name


def test_a_file_of_a_pair_is_loaded_into_the_same_pair_alone(tmp_path: Path) -> None:
    model, path = llama(), tmp_path / "chat.safetensors"
    cache = KVCache(model, PAIR)
    feed(cache, 1, 9)
    cache.save(path, model)
    loaded = KVCache.load(path, model)
    assert loaded.kv.codec == PAIR
    assert torch.equal(loaded.layers[0].values, cache.layers[0].values)
    layer = KVCache(model, "k:int4+v:int8").layers[0]
    with pytest.raises(ValueError, match=r"another codec, shape or dtype"):
        layer.adopt(cache.layers[0].contents())
