"""The suite ``moe``: the experts of one layer, called with a new random routing at every turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from hfkv.bench.contenders import Contender
from hfkv.bench.gate import FACTOR, SLACK, Errors, norm_error, what_is_wrong
from hfkv.bench.lane import Lane
from hfkv.bench.models import check_room
from hfkv.bench.setting import BenchError, Setting
from hfkv.bench.suite import Cell, Suite
from hfkv.bench.suites.moe_layers import (
    BATCHED,
    GROUPED,
    PEFT,
    Adapters,
    Layer,
    build_layer,
    ours,
    peers,
    reference,
    stock_model,
)
from hfkv.bench.turns import OUT_OF_MEMORY, out_of_memory
from hfkv.experts.packed import PackedWeights, unpackable
from hfkv.measure.machine import free_bytes
from hfkv.measure.timing import milliseconds, quantiles, queued_milliseconds
from hfkv.models.layer_shapes import MOE_SHAPES, MoEShape
from hfkv.policy.errors import RequestError

# Calls of one turn on an accelerator: its clock is too coarse for one.
CALLS_A_TURN = {"cpu": 1, "other": 8}
# `batched_mm` copies the weights of every choice of every token: beyond so much it is not waited for on a CPU, and does
# not fit beyond so large a part of what an accelerator has free.
MOST_COPIED, MOST_COPIED_SHARE = 10**9, 0.5
# On an accelerator transformers' generate() decodes with `batched_mm` and reads prompts with `grouped_mm`.
MOST_DECODED = 128
# A contender more than so many times as slow as `grouped_mm` sits out turns, so that the others have more of them: it
# takes every fourth at least.
SLOW, MOST_SAT_OUT = 5.0, 4
# Sides of the square matrices whose product shows the peak.
PEAK_SIZE, PEAK_PRODUCTS = {"cpu": 2048, "other": 8192}, 5
# As norms, of the whole output: three matrix products of Gaussian weights, each rounded once.
MOST_ERROR = {"int8": 2e-2, "int4": 1.2e-1}
# Tokens checked at least where calls have fewer: a single one's error is a matter of luck. Each call takes PEFT long.
CHECKED_TOKENS, CHECKED_TOKENS_OF_PEERS = 64, 4


class Call(NamedTuple):
    """What experts are called with: hidden `[T, H]`, K different experts a token, and their weights, of sum 1."""

    hidden: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor
    num_chosen: int  # experts that some token chose


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
            chosen = torch.rand(self.tokens, self.shape.experts, generator=self._generator)
            chosen = chosen.topk(self.shape.top_k).indices
            weights = torch.rand(chosen.shape, generator=self._generator).softmax(dim=1)
            num_chosen = int(chosen.unique().numel())
            self._made.append(Call(self._hidden, chosen.to(self.device), weights.to(self.device), num_chosen))
        return self._made[index]


class Gate:
    """The check of one number of tokens: outputs against fp32, and how far `grouped_mm` itself is from it."""

    def __init__(self, references: dict[bool, Any], calls: Calls) -> None:
        self.references = references  # in fp32, without and with adapters
        self.calls = [calls[index] for index in range(-(-CHECKED_TOKENS // calls.tokens))]
        self._standards: dict[bool, torch.Tensor] = {}
        self._stock: float | None = None

    def errors(self, contender: Contender, layer: Layer) -> Errors:
        """How far a contender's output is off, and whether that is too far; `grouped_mm` is the first to be asked."""
        tokens, has_lora = self.calls[0].hidden.shape[0], contender.bare is not None
        most = CHECKED_TOKENS if contender.is_ours or contender.name == GROUPED else CHECKED_TOKENS_OF_PEERS
        output = torch.cat([layer.experts(*call[:3]) for call in self.calls[: -(-most // tokens)]]).float()
        if has_lora not in self._standards:
            hidden, index, weights = map(torch.cat, zip(*(call[:3] for call in self.calls), strict=True))
            self._standards[has_lora] = self.references[has_lora](hidden.float(), index, weights)
        error = norm_error(output, self._standards[has_lora][: len(output)])
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


@dataclass(eq=False)
class MoELane(Lane):
    """One contender's layer at one number of tokens; it sits out turns where it is slower than `pace`, if any."""

    layer: Layer
    calls: Calls
    gate: Gate
    pace: MoELane | None = None

    warm_ups = 2

    def __post_init__(self) -> None:
        self.num_calls = CALLS_A_TURN["cpu" if self.calls.device.type == "cpu" else "other"]
        self.num_chosen: list[int] = []
        self._turn = -1

    def figures(self) -> dict[str, Any]:
        """Bytes of the weights, and how they are kept."""
        return {"held_bytes": self.layer.held_bytes, "form": self.layer.form}

    def check(self) -> Errors:
        return self.gate.errors(self.contender, self.layer)

    def work(self) -> Callable[[], object]:
        """The calls of the turn that it is."""
        start = max(self._turn, 0) * self.num_calls
        calls = [self.calls[start + index] for index in range(self.num_calls)]

        def run() -> None:
            for call in calls:
                self.layer.experts(call.hidden, call.chosen, call.weights)

        return run

    def turn(self) -> list[float]:
        """The next calls, as ms a call; nothing where it sits out."""
        self._turn += 1
        if self._turn % self.every:
            return []
        start = self._turn * self.num_calls
        self.num_chosen += [self.calls[start + index].num_chosen for index in range(self.num_calls)]
        return [queued_milliseconds(self.work(), self.calls.device, self.warm_ms) / self.num_calls]

    def counted(self) -> dict[str, Any]:
        """The bytes of the experts that were chosen in the median call, and its operations."""
        shape = self.calls.shape
        return {
            "read_bytes": int(self.layer.held_bytes * quantiles(self.num_chosen)[1] / shape.experts),
            "operations": 2 * self.calls.tokens * shape.top_k * shape.expert_size,
        }

    @property
    def every(self) -> int:
        """How many turns go by until it takes the next one."""
        if self.pace is None or not self.pace.warm_ms:
            return 1
        return min(max(round(self.warm_ms / (SLOW * self.pace.warm_ms)), 1), MOST_SAT_OUT)


class MoESuite(Suite):
    """The suite; every contender's layer is built here."""

    least_turns = 8

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if setting.shape not in MOE_SHAPES:
            raise BenchError(f"the suite moe has no shape {setting.shape!r}; allowed: {', '.join(MOE_SHAPES)}")
        self.shape = MOE_SHAPES[setting.shape]
        self.contenders = [*peers(setting.peers, self.device), *map(ours, setting.moes)]
        self.cells = [Cell(tokens) for tokens in setting.contexts]
        self._check_memory()
        stock = stock_model(self.shape, self.dtype, self.device, setting.seed)
        adapters = Adapters(self.shape, self.device, setting.seed + 1)
        self.references = {False: reference(stock, None), True: reference(stock, adapters)}
        self.layers: dict[str, Layer] = {}
        for index, contender in enumerate(self.contenders):
            try:
                if contender.reason is None:
                    self.layers[contender.name] = build_layer(contender, stock, adapters)
            except (*OUT_OF_MEMORY, RequestError) as error:
                reason = str(error) if isinstance(error, RequestError) else out_of_memory(error)
                self.contenders[index] = replace(contender, reason=reason)
        self.peak = matmul_peak(self.device, self.dtype)

    def lanes(self, cell: Cell) -> Callable[[Contender], Lane]:
        """The layers, with the same calls for all."""
        seed, given = self.setting.seed, (self.shape, cell.context, self.dtype, self.device)
        calls, gate = Calls(*given, seed), Gate(self.references, Calls(*given, seed + 1))
        first: list[MoELane] = []

        def lane(contender: Contender) -> MoELane:
            made = MoELane(contender, self.layers[contender.name], calls, gate, next(iter(first), None))
            if not first and self.setting.steps is None:
                first.append(made)
            return made

        return lane

    def reason(self, contender: Contender, cell: Cell) -> str | None:
        copied = cell.context * self.shape.top_k * self.shape.expert_size * self.dtype.itemsize
        most = MOST_COPIED if self.device.type == "cpu" else MOST_COPIED_SHARE * free_bytes(self.device)
        if contender.name == BATCHED and contender.reason is None and copied > most:
            return f"it copies the weights of every choice: {copied / 1e9:.1f} GB, run up to {most / 1e9:.1f} GB"
        return contender.reason

    def bases(self, cell: Cell) -> tuple[str, ...]:
        """What transformers' `generate` would run."""
        is_decode = self.device.type != "cpu" and cell.context <= MOST_DECODED
        return (BATCHED, GROUPED) if is_decode else (GROUPED,)

    def _check_memory(self) -> None:
        """All layers are there at once, one more that they are made from, and what PEFT multiplies out."""
        plain = self.shape.experts * self.shape.expert_size * self.dtype.itemsize
        copies = [c for c in self.contenders if c.reason is None]
        check_room(
            f"the experts of {self.setting.shape} are {plain / 1e9:.1f} GB, and {len(copies)} contenders",
            plain * (len(copies) + 1 + any(c.name == PEFT for c in copies)),
            self.device,
            f"name fewer with --moe and --peers ({GROUPED} is always among them), or take a smaller --shape",
        )


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of several large matrix products; a CPU's also in oneDNN's order."""
    size = PEAK_SIZE["cpu" if device.type == "cpu" else "other"]
    x, matrix = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    products: list[Callable[[], object]] = [lambda: F.linear(x, matrix)]
    if unpackable(matrix[None]) is None:
        packed = PackedWeights(matrix[None])
        products.append(lambda: packed.linear(x, 0))
    best = min(milliseconds(product, device) for product in products for _ in range(PEAK_PRODUCTS))
    return 2 * size**3 / (1e-3 * best)
