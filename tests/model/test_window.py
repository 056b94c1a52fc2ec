"""Windows against brute force: the rule on the full sequence, without a cache."""

import pytest
import torch

import hfkv
from hfkv import KVConfig, Window
from tests import brute_force
from tests.tiny import greedy, llama, llama_for, prompt
from tests.windowed import DYNAMIC, LENGTH, PADS, SPLITS, assert_ways_agree, error, expected, model_of, through_cache
from tests.zoo.named import NAMED

STORES = ["contiguous", "paged+page_size:4"]


@pytest.mark.pairwise
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("padding", PADS)
@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "glm4"])
def test_logits_equal_brute_force(name: str, sinks: int, size: int, padding: str, store: str, split: str) -> None:
    kv = KVConfig.parse(f"window:{size}+sinks:{sinks}+{store}")
    assert error(name, kv, padding, split) <= 1e-5


@pytest.mark.pairwise
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("store", [*STORES, "paged+page_size:16+offload"])
@pytest.mark.parametrize("padding", PADS)
@pytest.mark.parametrize("rule", ["", "+window:1+sinks:4", "+window:7+sinks:0", "+window:64+sinks:4"])
@pytest.mark.parametrize("codec", ["int8", "int4", "fp8"])
def test_codecs_equal_brute_force_on_decoded_keys_and_values(
    codec: str, rule: str, padding: str, store: str, split: str
) -> None:
    # In float64 no key is rounded the other way because a sum upstream differs in its last bit.
    kv = KVConfig.parse(f"{codec}{rule}+{store}")
    assert error("llama", kv, padding, split, torch.float64) <= 1e-5


RULES = {
    "cache": Window(12, 3, sink_positions="cache"),
    "cache, many sinks": Window(4, 9, sink_positions="cache"),
    "shrinks": Window(40, schedule=DYNAMIC["shrinks"], sinks=2),
    "jumps": Window(80, schedule=DYNAMIC["jumps"], sinks=2, sink_positions="cache"),
    "global heads": Window(9, 2, global_heads={1: [0]}),
    "global layer": Window(9, 2, global_layers=[1]),
    "summary": Window(10, 3, summary="mean", summary_pages=3, summary_page_size=4),
    "summary of large pages": Window(5, 0, summary="mean", summary_pages=2, summary_page_size=16),
    "summary of single tokens": Window(5, 2, summary="mean", summary_pages=4, summary_page_size=1),
    "all": Window(
        schedule=DYNAMIC["jumps"],
        size=30,
        sinks=3,
        sink_positions="cache",
        global_heads={1: [1]},
        summary="mean",
        summary_pages=3,
        summary_page_size=4,
    ),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("padding", PADS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["llama", "glm4"])
def test_every_rule_equals_brute_force(name: str, rule: str, padding: str, store: str, split: str) -> None:
    kv = KVConfig.parse(store)
    kv = KVConfig(window=RULES[rule], store=kv.store, page_size=kv.page_size)
    assert error(name, kv, padding, split) <= 1e-5


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("rule", ["cache", "jumps", "global heads", "summary", "all"])
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_every_rule_with_softcap_and_sink_logits(name: str, rule: str, split: str) -> None:
    assert error(name, KVConfig(window=RULES[rule]), "ragged", split) <= 1e-5


@pytest.mark.pairwise
@pytest.mark.parametrize("codec", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("padding", PADS)
def test_summaries_are_written_by_the_codec_whatever_the_split(padding: str, split: str, codec: str) -> None:
    kv = KVConfig(codec, window=RULES["summary"])
    model = model_of("llama", torch.float64)
    whole, parts = (through_cache(model, kv, padding, count) for count in (LENGTH, SPLITS[split]))
    real = torch.arange(LENGTH) >= torch.tensor(PADS[padding])[:, None]
    assert torch.allclose(whole[real], parts[real], atol=1e-6)


def test_the_rules_make_a_difference() -> None:
    full = expected("llama", KVConfig(), "no padding")
    rules = [Window(7, 0), Window(7, 4), *RULES.values()]
    found = [expected("llama", KVConfig(window=window), "no padding") for window in rules]
    for index, logits in enumerate(found):
        for other in (full, *found[:index]):
            assert (logits - other).abs().max() > 0.01 * full.abs().max()


@pytest.mark.parametrize(
    "window", [Window(8, 2), RULES["jumps"], RULES["summary"], RULES["all"]], ids=["plain", "jumps", "summary", "all"]
)
@pytest.mark.parametrize("kv", ["none", "int8+paged+page_size:4"])
def test_windows_under_beams_and_assistants(kv: str, window: Window) -> None:
    policies = KVConfig.parse(kv)
    policies = KVConfig(policies.codec, window, policies.store, policies.page_size)
    model = llama_for(kv)
    inputs = prompt(batch=1)
    with hfkv.patch(model, policies):
        assert_ways_agree(model, llama_for(kv, num_hidden_layers=2), policies, inputs)


@pytest.mark.pairwise
@pytest.mark.smoke
@pytest.mark.parametrize("window", [Window(8, 2), *RULES.values()], ids=["plain", *RULES])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}], ids=str)
def test_a_padded_row_generates_what_it_does_alone(window: Window, options: dict[str, int]) -> None:
    model = llama()
    padded = prompt(batch=2, length=30, padding=13)
    with hfkv.patch(model, KVConfig(window=window)):
        together = greedy(model, padded, 40, **options)
        for row, pad in ((0, 13), (1, 0)):
            alone = {name: tensor[row : row + 1, pad:] for name, tensor in padded.items()}
            assert torch.equal(together[row : row + 1, pad:], greedy(model, alone, 40, **options))


def test_a_generation_longer_than_the_window_holds_a_constant_number_of_bytes() -> None:
    model = llama()
    with hfkv.patch(model, "window:16+sinks:4"):
        sizes = []
        for new_tokens in (40, 80, 160):
            out = greedy(model, prompt(), new_tokens, return_dict_in_generate=True)
            sizes.append((out.past_key_values.held_bytes(), out.past_key_values.nbytes()))
    assert sizes[0] == sizes[1] == sizes[2]


# fmt: off
DECODERS = [
    "llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3", "gpt_neox",
    "olmo", "olmo2", "granite", "stablelm", "cohere2", "glm4", "mixtral", "qwen3_moe",
    "gpt_oss", "qwen3_next", "gpt2", "opt", "llava", "qwen2_vl", "mllama",
]
# fmt: on


@pytest.mark.smoke
@pytest.mark.parametrize("name", [name for name in DECODERS if name in NAMED])
def test_named_architectures_equal_brute_force(name: str) -> None:
    model = NAMED[name]().model.eval()
    # Linear attention takes no left padding from the reference, which masks attention layers only.
    pads = (0, 0, 0) if name == "qwen3_next" else (0, 2, 9)
    kv = KVConfig(window=Window(5, 2))
    torch.manual_seed(0)
    tokens = torch.randint(10, 90, (3, 24))
    mask = (torch.arange(24) >= torch.tensor(pads)[:, None]).long()
    positions = brute_force.positions(tokens, pads)
    with torch.no_grad():
        reference = brute_force.logits(model, tokens, kv, pads)
        with hfkv.patch(model, kv):
            cache = hfkv.KVCache(model, kv)
            parts = [
                model(
                    tokens[:, first : first + 7],
                    attention_mask=mask[:, : first + 7],
                    position_ids=positions[:, first : first + 7],
                    past_key_values=cache,
                ).logits
                for first in range(0, 24, 7)
            ]
    real = mask.bool()
    difference = (torch.cat(parts, dim=1) - reference)[real].abs().max()
    assert difference <= 1e-5 * reference[real].abs().max()
