"""What caches cost a model on a text: every config beside the full cache, chunk by chunk."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from hfkv.cache.kv_cache import KVCache
from hfkv.eval.divergence import kl_divergence
from hfkv.eval.loss import perplexity
from hfkv.eval.reader import CHUNK, CacheReader, check_model, chunk_slices, each_warning_once
from hfkv.eval.similarity import attention_outputs, cosines
from hfkv.models.probe import base_model
from hfkv.patches.patch import patch
from hfkv.policy.config import KVConfig

FULL = "none"


@dataclass(frozen=True)
class CacheReport:
    """What one cache cost, against the full one on the same tokens.

    Attributes:
        kv: The config as it was given; ``"none"`` is the full cache.
        nats: Mean negative log-likelihood, in nats a token.
        perplexity: e to the power of `nats`.
        perplexity_change_percent: Change of the perplexity from the full cache's.
        kl: Mean KL(full || this) of the next-token distributions, in nats a token.
        top1_agreement: Share of tokens for which both would choose the same next token, 0 to 1.
        attention_similarity: Mean over the layers of `attention_similarity_by_layer`, -1 to 1.
        attention_similarity_by_layer: Mean cosine of the attention modules' outputs, by layer index.
        held_bytes: Bytes of the tokens held once the first block has been read, of one row.
        allocated_bytes: Bytes allocated for these tokens.
        held_ratio: `held_bytes` over the full cache's.
        num_tokens: Tokens scored.
        seconds: Time spent reading and comparing.
        chunk: Tokens a forward.
        nats_by_position: Loss by position in the block: of the first `chunk` tokens of every block, of the next and
            so on.
    """

    kv: str
    nats: float
    perplexity: float
    perplexity_change_percent: float
    kl: float
    top1_agreement: float
    attention_similarity: float
    attention_similarity_by_layer: dict[int, float]
    held_bytes: int
    allocated_bytes: int
    held_ratio: float
    num_tokens: int
    seconds: float
    chunk: int
    nats_by_position: list[float]


@torch.inference_mode()
def compare(
    model: Any,
    ids: torch.Tensor,
    configs: Sequence[KVConfig | str] | Mapping[str, KVConfig],
    context: int | None = 1024,
    chunk: int = CHUNK,
    on_tokens: Callable[[str, int], None] = lambda kv, num_tokens: None,
    calibration: Any = None,
) -> list[CacheReport]:
    """Read a text under the full cache and under others, and score and compare every token.

    The text is cut into blocks that each begin with an empty cache and a BOS, or is read as one stream through one
    cache. All caches take turns chunk by chunk, so that only one chunk's logits of two runs are held at a time; the
    caches of all configs are held throughout.

    Args:
        model: A causal language model, or a `PeftModel` around one, not patched; it is left as it was. Where its
            config names no `bos_token_id`, the first token of each block is read and not scored.
        ids: Token ids of the text, [T], int64, without BOS.
        configs: What to compare with the full cache, which always comes first and is called ``"none"``. A config that
            says the same as an earlier one is left out, but of a mapping all are taken, under the names it gives them.
        context: Tokens a block; the last may be shorter. None reads one stream.
        chunk: Tokens a forward; 1 reads as generation does. See `chunk_slices`.
        on_tokens: Called after each forward with the config and how many tokens it read.
        calibration: What the mean of keys is taken over, where a codec takes one; see `hfkv.patch`.

    Returns:
        One report a config, the full cache's first.

    Raises:
        TypeError, ValueError, NotImplementedError: `ids` has nothing to score, a size is out of range, or see
            `CacheReader`.
        RuntimeError: The model is patched already.
    """
    names = distinct(configs)
    check_model(model)
    config = base_model(model).config.get_text_config(decoder=True)
    blocks = text_blocks(ids, getattr(config, "bos_token_id", None), context)
    tallies = [_Tally(name) for name in names]
    with each_warning_once():
        readers = [CacheReader(model, kv, calibration) for kv in names.values()]
        with attention_outputs(model) as outputs, patch(model):
            for inputs, targets in blocks:
                for reader in readers:
                    reader.start(inputs.shape[1])
                for piece in chunk_slices(inputs.shape[1], chunk):
                    ids, wanted = inputs[:, piece].to(model.device), targets[:, piece].to(model.device)
                    full = None
                    for reader, tally in zip(readers, tallies, strict=True):
                        start = time.perf_counter()
                        reading = _Reading(reader.read(ids), dict(outputs))
                        full = full or reading
                        tally.add(reading, full, wanted, piece.start // chunk)
                        tally.seconds += time.perf_counter() - start
                        on_tokens(tally.kv, ids.shape[1])
                for reader, tally in zip(readers, tallies, strict=True):
                    tally.note_bytes(reader.cache)
    return [tally.report(tallies[0], chunk) for tally in tallies]


def distinct(configs: Sequence[KVConfig | str] | Mapping[str, KVConfig]) -> dict[str, KVConfig]:
    """The configs by the name they were given under, the full cache first and each once; those of a mapping as it is.

    Raises:
        TypeError, ValueError: A config cannot be read.
    """
    if isinstance(configs, (str, KVConfig)):
        raise TypeError(f"configs must be a list of configs, got one: write [{configs!r}]")
    found = {FULL: KVConfig()}
    if isinstance(configs, Mapping):
        return {**found, **configs, FULL: KVConfig()}
    for given in configs:
        kv = KVConfig.of(given)
        if kv not in found.values():
            name = given if isinstance(given, str) else str(kv)
            # The string form leaves out what single layers do differently.
            found[repr(kv) if name in found else name] = kv
    return found


def text_blocks(
    ids: torch.Tensor, bos_token_id: int | None, context: int | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cuts a text into blocks: inputs [1, T] and the tokens that follow each of them, [1, T].

    Args:
        ids: Token ids of the text, [T], int64, without BOS.
        bos_token_id: Put before each block; None scores all but the block's first token.
        context: Tokens a block, the last may be shorter; None is one block.

    Raises:
        ValueError: `context` is too small, or nothing is left to score.
    """
    shortest = 1 if bos_token_id is not None else 2
    if ids.ndim != 1 or len(ids) < shortest:
        raise ValueError(f"ids must be one row of at least {shortest} tokens, not of shape {tuple(ids.shape)}")
    if context is not None and context < shortest:
        raise ValueError(f"context must be at least {shortest} tokens for this model, got {context}")
    blocks = []
    for block in ids.split(context or len(ids)):
        if bos_token_id is not None:
            block = torch.cat([block.new_tensor([bos_token_id]), block])
        if len(block) > 1:
            blocks.append((block[None, :-1], block[None, 1:]))
    return blocks


@dataclass
class _Reading:
    """One forward: logits [B, T, V] and the attention modules' outputs [B, T, hidden] by layer."""

    logits: torch.Tensor
    attention: dict[int, torch.Tensor]


@dataclass
class _Tally:
    """The sums of one config, on their way to a `CacheReport`."""

    kv: str
    num_tokens: int = 0
    num_same: int = 0
    nats: float = 0.0
    kl: float = 0.0
    seconds: float = 0.0
    held_bytes: int | None = None
    allocated_bytes: int = 0
    cosines: dict[int, float] = field(default_factory=dict)
    by_position: list[tuple[float, int]] = field(default_factory=list)

    def add(self, reading: _Reading, full: _Reading, targets: torch.Tensor, position: int) -> None:
        """Adds one chunk; `targets` is [B, T]."""
        loss = F.cross_entropy(reading.logits.float().flatten(0, 1), targets.flatten(), reduction="sum").item()
        self.nats += loss
        self.num_tokens += targets.numel()
        self.kl += kl_divergence(full.logits, reading.logits).sum().item()
        self.num_same += int((full.logits.argmax(-1) == reading.logits.argmax(-1)).sum())
        for layer, cosine in cosines(full.attention, reading.attention).items():
            self.cosines[layer] = self.cosines.get(layer, 0.0) + cosine.sum().item()
        if position == len(self.by_position):
            self.by_position.append((0.0, 0))
        nats, count = self.by_position[position]
        self.by_position[position] = (nats + loss, count + targets.numel())

    def note_bytes(self, cache: KVCache) -> None:
        """Takes the bytes of the first block's cache: the later ones are as long, or shorter."""
        if self.held_bytes is None:
            self.held_bytes, self.allocated_bytes = cache.held_bytes(), cache.nbytes()

    def report(self, full: _Tally, chunk: int) -> CacheReport:
        nats = self.nats / self.num_tokens
        by_layer = {layer: total / self.num_tokens for layer, total in self.cosines.items()}
        held, held_by_full = self.held_bytes or 0, full.held_bytes or 0
        return CacheReport(
            kv=self.kv,
            nats=nats,
            perplexity=perplexity(nats),
            perplexity_change_percent=100 * (perplexity(nats - full.nats / full.num_tokens) - 1),
            kl=self.kl / self.num_tokens,
            top1_agreement=self.num_same / self.num_tokens,
            attention_similarity=sum(by_layer.values()) / len(by_layer),
            attention_similarity_by_layer=by_layer,
            held_bytes=held,
            allocated_bytes=self.allocated_bytes,
            held_ratio=held / held_by_full,
            num_tokens=self.num_tokens,
            seconds=self.seconds,
            chunk=chunk,
            nats_by_position=[nats / count for nats, count in self.by_position],
        )
