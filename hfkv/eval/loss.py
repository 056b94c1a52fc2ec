"""Held-out loss: what a model's forecasts of a fixed text cost, in nats a byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel
else:
    Cache = Any  # for typing.get_type_hints, without the import
    PreTrainedModel = Any


@dataclass(frozen=True)
class LossReport:
    """The loss over a text, and the tokens the model would have chosen.

    Attributes:
        nats: Mean negative log-likelihood per token, in nats; with a byte-level tokenizer, per byte.
        num_tokens: Number of scored tokens.
        predictions: Arg-max tokens given the true text before them, [num_tokens], int64, on the CPU.
    """

    nats: float
    num_tokens: int
    predictions: torch.Tensor


@torch.inference_mode()
def held_out_loss(
    model: PreTrainedModel,
    ids: torch.Tensor,
    context: int = 512,
    make_cache: Callable[[], Cache] | None = None,
    batch_size: int = 8,
) -> LossReport:
    """Score every token of a text, cut into blocks of `context` tokens that each follow a BOS of their own.

    Args:
        model: A causal language model whose config names its `bos_token_id`.
        ids: Token ids of the text, [T], int64, without BOS.
        context: Tokens per block; the last block may be shorter.
        make_cache: Makes a fresh cache for each forward pass; None runs without a cache.
        batch_size: Blocks scored at once.

    Returns:
        The loss, the number of tokens and the predictions in the order of `ids`.

    Raises:
        ValueError: `ids` is empty or not one-dimensional, a size is below 1, or the model has no BOS.
    """
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"ids must be one non-empty row of tokens, not of shape {tuple(ids.shape)}")
    if context < 1 or batch_size < 1:
        raise ValueError(f"context and batch_size must be at least 1, got {context} and {batch_size}")
    if model.config.bos_token_id is None:
        raise ValueError(f"{model.config.model_type!r} has no bos_token_id in its config to put before each block")
    num_whole = len(ids) // context * context
    batches = list(ids[:num_whole].view(-1, context).split(batch_size)) if num_whole else []
    if num_whole < len(ids):
        batches.append(ids[num_whole:].view(1, -1))
    total = 0.0
    predictions = []
    for batch in batches:
        targets = batch.to(model.device)
        bos = torch.full_like(targets[:, :1], model.config.bos_token_id)
        inputs = torch.cat([bos, targets[:, :-1]], dim=1)
        if make_cache is None:
            logits = model(inputs, use_cache=False).logits
        else:
            logits = model(inputs, past_key_values=make_cache(), use_cache=True).logits
        total += F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum").item()
        predictions.append(logits.argmax(-1).flatten().cpu())
    return LossReport(nats=total / len(ids), num_tokens=len(ids), predictions=torch.cat(predictions))


def top1_agreement(a: LossReport, b: LossReport) -> float:
    """Return the share of tokens, 0 to 1, for which two reports of one text predict the same token.

    Raises:
        ValueError: The reports are of different lengths.
    """
    if a.num_tokens != b.num_tokens:
        raise ValueError(f"cannot compare predictions of {a.num_tokens} and {b.num_tokens} tokens")
    return (a.predictions == b.predictions).float().mean().item()


def perplexity(nats: float) -> float:
    """Return e to the mean loss in nats a token: between how many equally likely tokens the model seems to choose.

    A loss too large for the answer to be a float gives infinity.
    """
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
