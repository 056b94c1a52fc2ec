"""What the experts of the suite ``moe`` are called with, and the check of what they return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from hfkv.bench.contenders import Contender
from hfkv.bench.errors import BenchError
from hfkv.bench.gate import FACTOR, SLACK, Errors, norm_error, what_is_wrong
from hfkv.bench.moe_layers import GROUPED, Layer, MoEShape, Reference

# As norms, of the whole output: three matrix products of Gaussian weights, each rounded once.
MOST_ERROR = {"int8": 2e-2, "int4": 1.2e-1}
# Tokens checked at least where calls have fewer: a single one's error is a matter of luck. Each call takes PEFT long.
CHECKED_TOKENS, CHECKED_TOKENS_OF_PEERS = 64, 4


@dataclass(frozen=True)
class Call:
    """What the experts of a layer are called with.

    Attributes:
        hidden: `[T, H]`.
        index: `[T, K]`, K different experts a token, each as likely as any.
        weights: float32 `[T, K]`, of sum 1.
        num_chosen: how many experts some token chose.
    """

    hidden: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    num_chosen: int

    def run(self, experts: Any) -> torch.Tensor:
        """The layer's output `[T, H]`."""
        return experts(self.hidden, self.index, self.weights)


@dataclass
class Calls:
    """The calls of one number of tokens, in the order in which every contender takes them."""

    shape: MoEShape
    tokens: int
    dtype: torch.dtype
    device: torch.device
    seed: int
    _made: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        self._hidden = torch.randn(self.tokens, self.shape.hidden, generator=self._generator)
        self._hidden = self._hidden.to(self.device, self.dtype)

    def __getitem__(self, index: int) -> Call:
        while len(self._made) <= index:
            self._made.append(self._draw())
        return self._made[index]

    def _draw(self) -> Call:
        shape, generator = self.shape, self._generator
        chosen = torch.rand(self.tokens, shape.experts, generator=generator).topk(shape.top_k).indices
        weights = torch.rand(self.tokens, shape.top_k, generator=generator).softmax(dim=1)
        num_chosen = int(chosen.unique().numel())
        return Call(self._hidden, chosen.to(self.device), weights.to(self.device), num_chosen)


class Gate:
    """The check of one number of tokens: outputs against fp32, and how far `grouped_mm` itself is from it.

    Args:
        references: the layer in fp32, without and with adapters.
        calls: what is checked.
    """

    def __init__(self, references: dict[bool, Reference], calls: Calls) -> None:
        self.references = references
        self.calls = [calls[index] for index in range(-(-CHECKED_TOKENS // calls.tokens))]
        self._standards: dict[bool, torch.Tensor] = {}
        self._stock: float | None = None

    def errors(self, contender: Contender, layer: Layer) -> Errors:
        """How far a contender's output is off, and whether that is too far; `grouped_mm` is the first to be asked."""
        tokens = self.calls[0].hidden.shape[0]
        most = CHECKED_TOKENS if contender.is_ours or contender.name == GROUPED else CHECKED_TOKENS_OF_PEERS
        calls = self.calls[: -(-most // tokens)]
        output = torch.cat([call.run(layer.experts) for call in calls]).float()
        error = norm_error(output, self._standard(contender.bare is not None)[: len(output)])
        if contender.name == GROUPED:
            self._stock = error
        if contender.moe is None:
            return Errors(full=error)
        if self._stock is None:
            raise BenchError(
                f"{GROUPED}, whose own error is the measure of hfkv's, did not run at {tokens:,} tokens; ask for "
                "fewer with --tokens"
            )
        allowed = MOST_ERROR.get(contender.moe.codec, FACTOR * self._stock + SLACK)
        return Errors(full=error, wrong=what_is_wrong(output, error, allowed, "the experts in fp32, as norms"))

    def _standard(self, has_lora: bool) -> torch.Tensor:
        if has_lora not in self._standards:
            given = [torch.cat([getattr(c, name) for c in self.calls]) for name in ("hidden", "index", "weights")]
            self._standards[has_lora] = self.references[has_lora](*given)
        return self._standards[has_lora]
