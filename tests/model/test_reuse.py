"""Prefixes that calls of a patched model share: the tokens of a cold run, from pages that are really found."""

from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import hfkv
from hfkv import tiny_lm
from tests.tiny import greedy, llama, llama_for, prompt
from tests.zoo import NAMED, generate

# Encoder-decoders, and layers whose state is not a token's own (linear attention, cross-attention).
CANNOT_SHARE = {"t5", "bart", "whisper", "qwen3_next", "mllama"}
# They are given no positions, so a padded prompt is not looked up.
COUNTS_PADDING = {"bloom"}
PAGED = "+paged+page_size:8+reuse"
CONFIGS = (
    "none+reuse",
    "none" + PAGED,
    "int8+reuse",
    "int8" + PAGED,
    "int4" + PAGED,
    "fp8" + PAGED,
    "offload+reuse",
    "int8+offload" + PAGED,
    "window:24+sinks:3" + PAGED,
    "int8+window:24+sinks:3+reuse",
    "window:24+global_heads:0=1" + PAGED,
    "window:24+sinks:2+sink_positions:cache" + PAGED,
    "window:dynamic+size:40" + PAGED,
    "window:24+summary:mean+summary_pages:2+summary_page_size:4" + PAGED,
    "int4+recent:24:int8" + PAGED,
)
SHARED = "none+paged+page_size:8+reuse"


def cold(model: Any, kv: str, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    with hfkv.patch(model, kv.replace("+reuse", "").replace("reuse", "none")):
        return greedy(model, inputs, **options)


def longer(inputs: dict[str, torch.Tensor], count: int, seed: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    ids = inputs["input_ids"]
    more = torch.randint(3, 99, (len(ids), count))
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(more)), dim=1)
    return {"input_ids": torch.cat((ids, more), dim=1), "attention_mask": mask}


@pytest.mark.smoke
@pytest.mark.parametrize("kv", CONFIGS)
def test_a_hit_gives_the_tokens_of_a_cold_run(kv: str) -> None:
    model = llama_for(kv)
    first = prompt(1, 70)
    second = longer(first, 9)
    expected = [cold(model, kv, inputs) for inputs in (first, second)]
    with hfkv.patch(model, kv) as patch:
        page = patch.kv.page_size or 64
        for inputs, text in zip((first, second, second), (*expected, expected[1]), strict=True):
            assert torch.equal(greedy(model, inputs), text)
        stats = patch.reuse_stats()
    assert (stats.lookups, stats.hits) == (3, 2)
    # The first finds nothing, the second the whole pages of the first's 70 tokens, the third all but the last token.
    assert stats.tokens_reused == 70 // page * page + 78 // page * page
    assert stats.tokens == 70 + 79 + 79
    assert stats.nbytes > 0


def test_only_what_is_new_is_read(rows_read: list[tuple[int, int]]) -> None:
    model = llama()
    inputs = prompt(1, 40)
    with hfkv.patch(model, "none" + PAGED):
        greedy(model, inputs, 1)
        assert rows_read[0] == (1, 40)
        rows_read.clear()
        greedy(model, inputs, 1)
        assert rows_read[0] == (1, 8)  # 32 of 40 were there: at least one token must be read


def test_a_reply_is_found_by_the_next_turn(rows_read: list[tuple[int, int]]) -> None:
    model = llama()
    inputs = prompt(1, 20)
    with hfkv.patch(model, "none" + PAGED):
        reply = greedy(model, inputs, 30)
        turn = longer({"input_ids": reply, "attention_mask": torch.ones_like(reply)}, 5)
        expected = cold_of(turn)
        rows_read.clear()
        assert torch.equal(greedy(model, turn), expected)
    # 50 tokens of the first turn, the last of which was never read.
    assert rows_read[0] == (1, 55 - 48)


def cold_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return greedy(llama(), inputs)


@pytest.mark.parametrize("kv", ["none" + PAGED, "int8+reuse", "window:24+sinks:3" + PAGED, "none+offload+reuse"])
def test_left_padded_rows_share_whatever_their_padding(kv: str) -> None:
    model = llama_for(kv)
    whole = prompt(1, 80)["input_ids"][0]
    texts = [whole, torch.cat((whole[:70], whole[:4])), whole[3:], whole[:30]]
    length = max(map(len, texts))
    ids = torch.stack([torch.cat((torch.zeros(length - len(text), dtype=torch.long), text)) for text in texts])
    mask = torch.stack([torch.arange(length) >= length - len(text) for text in texts]).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = cold(model, kv, inputs)
    with hfkv.patch(model, kv) as patch:
        greedy(model, {"input_ids": whole[None], "attention_mask": torch.ones(1, 80, dtype=torch.long)}, 1)
        assert torch.equal(greedy(model, inputs), expected)
        before = patch.reuse_stats().tokens_reused
        assert before > 0
        assert torch.equal(greedy(model, inputs), expected)
        assert patch.reuse_stats().tokens_reused > before


def test_a_batch_that_begins_alike_is_read_once(rows_read: list[tuple[int, int]]) -> None:
    model = llama()
    shared = prompt(1, 64)["input_ids"].expand(5, -1)
    inputs = longer({"input_ids": shared, "attention_mask": torch.ones_like(shared)}, 6)
    expected = cold_of(inputs)
    with hfkv.patch(model, "none" + PAGED) as patch:
        rows_read.clear()
        output = greedy(model, inputs, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert rows_read[0] == (1, 64)
    assert (5, 6) in rows_read
    # The rows share the pages of what they begin with.
    table = output.past_key_values.layers[0].store.table
    assert len({tuple(row[:8]) for row in table}) == 1
    assert patch.kv.page_size == 8


def test_one_cold_row_does_not_make_the_others_read_again(rows_read: list[tuple[int, int]]) -> None:
    model = llama()
    inputs = prompt(3, 64)
    with hfkv.patch(model, "none" + PAGED):
        warm = {name: value[:2] for name, value in inputs.items()}
        greedy(model, warm, 1)
        expected = cold_of(inputs)
        rows_read.clear()
        assert torch.equal(greedy(model, inputs), expected)
    assert rows_read[0] == (1, 56)
    assert (3, 8) in rows_read
    assert (3, 64) not in rows_read


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


class Enough(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 77)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "beams_returned": {"num_beams": 4, "num_return_sequences": 2},
    "beam_sample": {"num_beams": 3, "do_sample": True},
    "samples": {"num_return_sequences": 3, "do_sample": True},
    "prompt_lookup": {"prompt_lookup_num_tokens": 2},
    "chunked": {"prefill_chunk_size": 7},
    "chunked_beams": {"prefill_chunk_size": 16, "num_beams": 3},
    "stopped": {"stopping_criteria": StoppingCriteriaList([Enough()])},
}


@pytest.mark.smoke
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kv", ["none" + PAGED, "int8+reuse"])
def test_every_mode_finds_pages_and_changes_nothing(mode: str, kv: str) -> None:
    model = llama_for(kv)
    inputs = prompt(1, 70)

    def run() -> torch.Tensor:
        torch.manual_seed(5)
        return model.generate(**inputs, **{"max_new_tokens": 12, "do_sample": False, **MODES[mode]})

    with hfkv.patch(model, kv.replace("+reuse", "")):
        expected = run()
    with hfkv.patch(model, kv) as patch:
        assert torch.equal(run(), expected)
        assert torch.equal(run(), expected)
        stats = patch.reuse_stats()
        assert stats.hits == 1
        assert stats.tokens_reused >= 64


def test_beams_that_find_their_prompt_share_its_pages() -> None:
    model, inputs = llama(), prompt(1, 700)
    with hfkv.patch(model, "reuse") as patch:
        for hits in (0, 1):
            output = greedy(model, inputs, num_beams=4, return_dict_in_generate=True)
            assert patch.reuse_stats().hits == hits
            store = output.past_key_values.layers[0].store
            # 700 tokens and 12 new ones: two whole pages of 256, and a third of each beam's own.
            assert store.blocks.size == 2 + 4
            assert 2 < store.blocks.used <= 2 + 4


def test_an_assistant_finds_pages_too() -> None:
    model, assistant = llama(), llama()
    inputs = prompt(1, 70)
    expected = greedy(model, inputs)
    with hfkv.patch(model, "none" + PAGED) as patch, hfkv.patch(assistant, "none" + PAGED) as other:
        for _ in range(3):
            assert torch.equal(greedy(model, inputs, assistant_model=assistant), expected)
        assert patch.reuse_stats().hits == 2
        assert other.reuse_stats().hits == 2


def test_a_streamer_hears_what_it_hears_without() -> None:
    model, heard = llama(), [Heard(), Heard()]
    inputs = prompt(1, 70)
    greedy(model, inputs, streamer=heard[0])
    with hfkv.patch(model, "none" + PAGED):
        greedy(model, inputs)
        greedy(model, inputs, streamer=heard[1])
    assert heard[0].tokens == heard[1].tokens


@pytest.mark.smoke
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("name", NAMED)
def test_every_architecture_that_can_share_does(name: str, mode: dict[str, Any]) -> None:
    model, inputs = NAMED[name]().model, NAMED[name]().inputs
    if name == "gemma2":
        model.set_attn_implementation("eager")
    expected, logits = generate(model, inputs, **mode)
    try:
        patch = hfkv.patch(model, "none+paged+page_size:2+reuse")
    except ValueError as error:
        assert "reuse" in str(error)  # noqa: PT017 - which architectures may refuse is asserted below
        assert name in CANNOT_SHARE
        return
    with patch:
        for _ in range(2):
            tokens, ours = generate(model, inputs, **mode)
            assert torch.equal(tokens, expected)
            torch.testing.assert_close(ours, logits, atol=2e-4, rtol=2e-4)
        # The second call finds pages, where the prompt is no more than ids.
        is_plain = inputs.keys() <= {"input_ids", "attention_mask"}
        assert (patch.reuse_stats().hits > 0) == (is_plain and name not in COUNTS_PADDING)


def test_hidden_states_of_all_tokens_are_read_and_spoil_nothing_after() -> None:
    model, inputs = llama(), prompt(1, 40)
    options = {"output_hidden_states": True, "return_dict_in_generate": True}
    with hfkv.patch(model, SHARED) as patch:
        for _ in range(2):
            output = greedy(model, inputs, **options)
            assert output.hidden_states[0][0].shape[1] == 40
        assert patch.reuse_stats().lookups == 0
        greedy(model, inputs)
        greedy(model, inputs)
        # transformers captures hidden states by hooks that stay.
        assert patch.reuse_stats().hits == 1
        for _ in range(2):
            cache = greedy(model, inputs, 1, past_key_values=hfkv.KVCache(model), return_dict_in_generate=True)
            longer = torch.cat((cache.sequences, inputs["input_ids"]), dim=1)
            beams = greedy(model, {"input_ids": longer}, num_beams=3, past_key_values=cache.past_key_values, **options)
            assert torch.equal(beams.sequences, greedy(model, {"input_ids": longer}, num_beams=3))


def test_stop_strings_find_pages_too() -> None:
    model, tokenizer = tiny_lm.load(torch.float32)
    inputs = tokenizer("def f(x):\n    return x\n\ndef g", return_tensors="pt")
    options = {"stop_strings": ["\n"], "tokenizer": tokenizer, "max_new_tokens": 20, "do_sample": False}
    expected = model.generate(**inputs, **options)
    with hfkv.patch(model, SHARED) as patch:
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **options), expected)
        assert patch.reuse_stats().hits == 1


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_text_alone_is_shared_by_models_of_images_too(name: str) -> None:
    model = NAMED[name]().model
    inputs = {"input_ids": torch.randint(10, 60, (1, 20)), "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    expected, _ = generate(model, inputs)
    beams, _ = generate(model, inputs, num_beams=3)
    with hfkv.patch(model, "none+paged+page_size:4+reuse") as patch:
        for _ in range(2):
            assert torch.equal(generate(model, inputs)[0], expected)
        assert patch.reuse_stats().hits == 1
        assert torch.equal(generate(model, inputs, num_beams=3)[0], beams)
