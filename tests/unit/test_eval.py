"""The measures of `hfkv.eval`: against what they mean, worked out another way."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForSeq2SeqLM,
    T5Config,
)

import hfkv
from hfkv import tiny_lm
from hfkv.eval import (
    attention_similarity,
    compare,
    held_out_loss,
    kl_divergence,
    perplexity,
    top1_agreement,
    write_plots,
)
from hfkv.eval.compare import text_blocks
from hfkv.eval.reader import chunk_slices, each_warning_once
from tests.tiny import llama

CONTEXT = 160
# Two whole blocks and a shorter one.
NUM_TOKENS = 2 * CONTEXT + 45
# Keys and values of 4 layers, 2 heads, 64 numbers of 4 bytes.
TOKEN_BYTES = 2 * 4 * 2 * 64 * 4


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    return tiny_lm.load(torch.float32)


@pytest.fixture(scope="module")
def ids(bundled: tuple[Any, Any]) -> torch.Tensor:
    text = tiny_lm.held_out_text()[:NUM_TOKENS]
    return bundled[1](text, add_special_tokens=False, return_tensors="pt").input_ids[0]


# The numbers of one pair of runs.


def test_perplexity_of_even_odds_is_their_number() -> None:
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e6) == math.inf


def test_kl_divergence_is_that_of_the_distributions() -> None:
    a, b = torch.randn(2, 3, 17), torch.randn(2, 3, 17)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=a), torch.distributions.Categorical(logits=b)
    )
    assert torch.allclose(kl_divergence(a, b), expected, atol=1e-6)
    assert not torch.allclose(kl_divergence(a, b), kl_divergence(b, a), atol=1e-3)
    # A constant added to the logits changes no distribution.
    assert kl_divergence(a, a + 5).max() < 1e-6


def test_kl_divergence_of_forecasts_that_rule_tokens_out() -> None:
    full = torch.tensor([[0.0, 0.0, -math.inf]])
    assert kl_divergence(full, full).item() == 0
    assert kl_divergence(full, torch.tensor([[0.0, 0.0, 0.0]])).item() == pytest.approx(math.log(3 / 2))
    assert kl_divergence(full, torch.tensor([[0.0, -math.inf, 0.0]])).item() == math.inf


def test_kl_divergence_of_different_texts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 5\) and \(2, 5\)"):
        kl_divergence(torch.zeros(1, 5), torch.zeros(2, 5))


# Reading a text.


@pytest.mark.parametrize(
    ("num_tokens", "chunk", "lengths"),
    [(1, 4, [1]), (2, 4, [1, 1]), (5, 4, [4, 1]), (6, 4, [4, 1, 1]), (9, 4, [4, 4, 1]), (3, 1, [1, 1, 1])],
)
def test_the_last_token_of_a_text_goes_in_alone(num_tokens: int, chunk: int, lengths: list[int]) -> None:
    pieces = chunk_slices(num_tokens, chunk)
    assert [piece.stop - piece.start for piece in pieces] == lengths
    assert torch.equal(torch.cat([torch.arange(num_tokens)[piece] for piece in pieces]), torch.arange(num_tokens))


def test_blocks_hold_every_token_once() -> None:
    ids = torch.arange(10)
    with_bos = text_blocks(ids, 99, 4)
    assert [inputs.tolist() for inputs, _ in with_bos] == [[[99, 0, 1, 2]], [[99, 4, 5, 6]], [[99, 8]]]
    assert [targets.tolist() for _, targets in with_bos] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9]]]
    without = text_blocks(torch.arange(9), None, 4)
    assert [targets.tolist() for _, targets in without] == [[[1, 2, 3]], [[5, 6, 7]]]
    assert [targets.tolist() for _, targets in text_blocks(ids, 99, None)] == [[list(range(10))]]


def test_warnings_are_told_once_while_it_lasts(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("hfkv")
    with each_warning_once():
        logger.warning("one")
        logger.warning("one")
        logger.warning("other")
    logger.warning("one")
    assert [record.getMessage() for record in caplog.records] == ["one", "other", "one"]


# compare


def test_the_full_cache_has_the_loss_of_a_forward_without_any(bundled: tuple[Any, Any], ids: torch.Tensor) -> None:
    model, _ = bundled
    plain = held_out_loss(model, ids, CONTEXT)
    (full,) = compare(model, ids, [], CONTEXT, chunk=64)
    assert full.kv == "none"
    assert full.num_tokens == NUM_TOKENS
    assert full.nats == pytest.approx(plain.nats, abs=1e-5)
    assert full.perplexity == pytest.approx(math.exp(plain.nats), rel=1e-4)
    assert (full.kl, full.top1_agreement, full.perplexity_change_percent, full.held_ratio) == (0, 1, 0, 1)
    assert full.attention_similarity == pytest.approx(1)
    assert full.held_bytes == CONTEXT * TOKEN_BYTES


WINDOWS = ["window:48+sink_positions:cache", "window:48+summary:mean+summary_page_size:16", "window:48+global_layers:0"]


@pytest.mark.parametrize("kv", ["int4", "window:48", "int8+window:48+paged", *WINDOWS])
def test_chunks_give_the_numbers_of_one_forward(ids: torch.Tensor, kv: str) -> None:
    # In float64: in float32 a value that lies between two codes may fall either way, and one such code moves the loss
    # by 1e-4.
    model, _ = tiny_lm.load(torch.float64)
    with hfkv.patch(model, kv):
        lossy = held_out_loss(model, ids, CONTEXT, make_cache=model.hfkv.new_cache, batch_size=1)
    plain = held_out_loss(model, ids, CONTEXT)
    divergences = []
    for inputs, _ in text_blocks(ids, model.config.bos_token_id, CONTEXT):
        with torch.inference_mode(), hfkv.patch(model, kv):
            other = model(inputs, past_key_values=model.hfkv.new_cache()).logits
        with torch.inference_mode():
            p, q = model(inputs).logits.softmax(-1), other.softmax(-1)
        divergences.append((p * (p / q).log()).sum(-1).flatten())

    full, report = compare(model, ids, [kv], CONTEXT, chunk=64)
    assert report.nats == pytest.approx(lossy.nats, abs=1e-4)
    assert report.perplexity_change_percent == pytest.approx(100 * (math.exp(lossy.nats - plain.nats) - 1), abs=0.02)
    assert report.kl == pytest.approx(torch.cat(divergences).mean().item(), rel=0.02)
    assert report.kl > 1e-4
    assert report.top1_agreement == pytest.approx(top1_agreement(plain, lossy), abs=0.01)
    assert report.top1_agreement < 1
    assert report.held_bytes < full.held_bytes


@pytest.mark.parametrize("kv", ["paged", "offload"])
def test_a_lossless_cache_costs_nothing(bundled: tuple[Any, Any], ids: torch.Tensor, kv: str) -> None:
    _, report = compare(bundled[0], ids[:200], [kv], CONTEXT, chunk=64)
    assert report.kl < 1e-6
    assert report.top1_agreement == 1
    assert report.attention_similarity == pytest.approx(1, abs=1e-6)
    assert report.perplexity_change_percent == pytest.approx(0, abs=1e-3)


def test_bytes_are_those_of_one_block_after_a_single_token(bundled: tuple[Any, Any], ids: torch.Tensor) -> None:
    full, window, int8 = compare(bundled[0], ids, ["window:48+sinks:4", "int8"], CONTEXT, chunk=64)
    assert window.held_bytes == (48 + 4) * TOKEN_BYTES
    assert window.allocated_bytes >= window.held_bytes
    assert window.held_ratio == pytest.approx(52 / CONTEXT)
    assert int8.held_ratio == pytest.approx((64 + 2) / (64 * 4))
    assert full.allocated_bytes == full.held_bytes  # as much as was reserved


def test_a_stream_is_one_block(bundled: tuple[Any, Any], ids: torch.Tensor) -> None:
    model, _ = bundled
    streamed = compare(model, ids, ["window:48"], context=None, chunk=64)
    block = compare(model, ids, ["window:48"], context=len(ids), chunk=64)
    assert [report.nats for report in streamed] == [report.nats for report in block]
    assert streamed[0].held_bytes == NUM_TOKENS * TOKEN_BYTES
    assert streamed[1].held_bytes == (48 + 4) * TOKEN_BYTES
    assert len(streamed[0].nats_by_position) == math.ceil(NUM_TOKENS / 64)


def test_the_loss_by_position_is_the_losss_parts(bundled: tuple[Any, Any], ids: torch.Tensor) -> None:
    model, _ = bundled
    (report,) = compare(model, ids, [], CONTEXT, chunk=64)
    blocks = text_blocks(ids, model.config.bos_token_id, CONTEXT)
    losses = []
    for inputs, targets in blocks:
        with torch.inference_mode():
            losses.append(F.cross_entropy(model(inputs).logits[0], targets[0], reduction="none"))
    parts = [torch.cat([loss[start : start + 64] for loss in losses]) for start in range(0, CONTEXT, 64)]
    assert report.nats_by_position == pytest.approx([part.mean().item() for part in parts], abs=1e-4)
    assert report.chunk == 64


def test_no_forward_is_longer_than_a_chunk(bundled: tuple[Any, Any], ids: torch.Tensor) -> None:
    model, _ = bundled
    lengths: list[int] = []
    read: list[tuple[str, int]] = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    try:
        compare(model, ids, ["int8"], CONTEXT, chunk=64, on_tokens=lambda kv, count: read.append((kv, count)))
    finally:
        hook.remove()
    assert max(lengths) == 64
    for kv in ("none", "int8"):
        assert sum(count for name, count in read if name == kv) == NUM_TOKENS


def test_configs_that_say_the_same_run_once(bundled: tuple[Any, Any], ids: torch.Tensor) -> None:
    by_layer = hfkv.KVConfig(layers={"0": hfkv.KVConfig(codec="int4")})
    configs = [
        "int8",
        "none",
        "int8+contiguous",
        "window:48",
        "window:48+sinks:4",
        hfkv.KVConfig(codec="int8"),
        by_layer,
    ]
    reports = compare(bundled[0], ids[:8], configs)
    assert [report.kv for report in reports] == ["none", "int8", "int8+contiguous", "window:48", repr(by_layer)]
    assert reports[-1].kl > 0


def test_a_model_without_bos_skips_each_blocks_first_token() -> None:
    model = llama(bos_token_id=None)
    ids = torch.randint(3, 99, (50,))
    (report,) = compare(model, ids, [], context=20, chunk=8)
    assert report.num_tokens == 50 - 3
    with torch.inference_mode():
        blocks = [F.cross_entropy(model(b[None]).logits[0, :-1], b[1:], reduction="none") for b in ids.split(20)]
    assert report.nats == pytest.approx(torch.cat(blocks).mean().item(), abs=1e-4)


def hooks_of(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_the_model_is_left_as_it_was_also_after_an_error(bundled: tuple[Any, Any], ids: torch.Tensor) -> None:
    model, _ = bundled

    def fail(kv: str, count: int) -> None:
        if kv == "window:48":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(model, ids, ["window:48"], on_tokens=fail)
    compare(model, ids[:20], ["int8"])
    attention_similarity(model, ids[:20], "int8")
    assert hooks_of(model) == 0
    assert not hasattr(model, "hfkv")
    assert model.config._attn_implementation == "sdpa"


def test_what_cannot_be_compared_is_refused(bundled: tuple[Any, Any], ids: torch.Tensor) -> None:
    model, _ = bundled
    for wrong in (ids[:0], ids[None]):
        with pytest.raises(ValueError, match="ids must be one"):
            compare(model, wrong, [])
        with pytest.raises(ValueError, match="ids must be one"):
            attention_similarity(model, wrong, "int8")
    with pytest.raises(ValueError, match="context must be at least 1"):
        compare(model, ids, [], context=0)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        compare(model, ids, [], chunk=0)
    with pytest.raises(ValueError, match="'int9'"):
        compare(model, ids, ["int9"])
    with hfkv.patch(model), pytest.raises(RuntimeError, match="already patched"):
        compare(model, ids, [])


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder"):
        compare(AutoModelForSeq2SeqLM.from_config(config), torch.arange(3, 9), [])


# Pictures.


def test_pictures_are_png_files(bundled: tuple[Any, Any], ids: torch.Tensor, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason='the pictures need matplotlib: pip install "hfkv[plot]"')
    reports = compare(bundled[0], ids, ["int8+window:48"], CONTEXT)
    grids = {report.kv: torch.tensor([[0.0, 0.5], [1.0, 0.25], [0.1, 0.2]]) for report in reports}
    paths = write_plots(tmp_path / "new", reports, grids, [100, 200], [0, 0.5, 1])
    names = ["costs", "attention_similarity", "loss_by_position", "pass_keys_none", "pass_keys_int8-window-48"]
    assert [path.stem for path in paths] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert len(write_plots(tmp_path, reports)) == 3


def test_pictures_without_matplotlib_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "hfkv\[plot\]"'):
        write_plots(tmp_path, [])
