"""`Setting`: what a run measures; `Case`: a table of the suite ``mla``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hfkv.policy.errors import RequestError

HOST, MOE, MLA = "host", "moe", "mla"
SUITES = ("attention", "step", "memory", "prefill", "reuse", HOST, MOE, MLA)
DEFAULT_KV = ("none", "int8", "int4", "fp8", "paged", "int8+paged", "window:1024")
GRAPHS_KV = ("none+graphs", "int8+graphs", "int8+paged+graphs")  # besides, for steps on a GPU
HOST_KV = ("none", "int8", "fp8", "int4", "paged", "int8+paged", "window:32", "int8+window:32", "offload", "reuse")
REUSE_KV = ("none", "none+reuse", "int8", "int8+reuse")  # of the suite reuse
MLA_KV = ("none", "int8", "int4", "paged")
DEFAULT_MOE = ("auto", "int8", "int4", "auto+lora")
DECODE, STEP, PREFILL, CROSSOVER = "decode", "step", "prefill", "crossover"
# By part of the suite mla, tokens held and new ones of a call where nothing is said; and prompts, held by nothing.
PARTS: dict[str, tuple[int, tuple[int, ...]]] = {
    DECODE: (16_384, (1,)),
    STEP: (8192, (1,)),
    PREFILL: (8192, (512,)),
    CROSSOVER: (4096, (16, 32, 64, 128, 170, 256, 512)),
}
PROMPTS = (256, 1024, 4096)
MOST_SEED = (1 << 63) - 2  # and the one after it, which torch takes too
MOST_SIZE = 1 << 40


class BenchError(RequestError):
    """What cannot be measured, what is allowed and the remedy."""


@dataclass(frozen=True)
class Case:
    """One table of the suite ``mla``.

    Its part is ``"decode"``, one layer and one new token; ``"step"``, a step of `generate`; ``"prefill"``, one layer
    that reads many at once; or ``"crossover"``, the same by absorbed and by expanded attention.
    """

    part: str
    held: int  # tokens in the cache before
    new: int  # tokens of a call

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise BenchError(f"the part {self.part!r} is unknown; allowed: {', '.join(PARTS)}")
        if self.new < 1 or self.held < 0 or (self.held == 0 and self.part != PREFILL):
            raise BenchError(
                f"the part {self.part} needs at least 1 new token, got {self.new}, and 1 held (prefill: 0), got "
                f"{self.held}"
            )
        if self.new != 1 and self.part in (DECODE, STEP):
            raise BenchError(f"the part {self.part} reads one new token at a time, got {self.new}")

    @property
    def context(self) -> int:
        """Tokens held, or of the prompt: the context of its table."""
        return self.held or self.new


def cases_of(parts: Iterable[str], tokens: Sequence[int] = (), queries: Sequence[int] = ()) -> tuple[Case, ...]:
    """The cases of some parts.

    Args:
        parts: names in `PARTS`.
        tokens: held, or of a prompt; empty for each part's own.
        queries: new tokens at once, in `prefill` behind those held; empty for each part's own.

    Raises:
        BenchError: a part is unknown.
    """
    cases: list[Case] = []
    for part in parts:
        held, new = PARTS.get(part, (1, (1,)))
        if part == PREFILL and not queries:
            cases += [Case(part, 0, length) for length in tokens or PROMPTS]
            cases += [] if tokens else [Case(part, held, *new)]
        else:
            several = queries if queries and part in (PREFILL, CROSSOVER) else new
            cases += [Case(part, count, one) for count in tokens or [held] for one in several]
    return tuple(cases)


@dataclass(frozen=True)
class Setting:
    """What a run measures.

    Attributes:
        shape: a name in `SHAPES`, in the suite moe in `MOE_SHAPES`, in mla in `MLA_SHAPES`; None with `model`.
        model: a folder or a name on the Hub, of which only the config is read; may be None.
        layers: layers to build or to take turns over; None for the suite's own choice. In mla: of the part step.
        contexts: tokens in the cache before a step, or of a prompt, or of a call in the suite moe; not in mla.
        ragged: real tokens of each row of one left-padded prompt, in place of `contexts` and `batch`; prefill and
            host only.
        kvs, moes: hfkv's contenders, and those of the suite moe.
        peers: names in `PEERS`, in the suite moe in `MOE_PEERS`; None for all that can run. DynamicCache, there
            grouped_mm, is always among them.
        steps: timed steps of each contender; None for as many as fit in `seconds`.
        seconds: how long the contenders of one context take turns at least, filling their caches left out.
        seed: seeds the random keys, values, tokens and weights.
        busy: other processes that keep cores busy while the contenders take turns.
        cases: the tables of the suite mla, in place of contexts.
    """

    suite: str
    shape: str | None = None
    model: str | None = None
    layers: int | None = None
    contexts: tuple[int, ...] = ()
    batch: int = 1
    ragged: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    device: str = "cpu"
    kvs: tuple[str, ...] = DEFAULT_KV
    peers: tuple[str, ...] | None = None
    steps: int | None = None
    seconds: float = 10.0
    seed: int = 0
    moes: tuple[str, ...] = DEFAULT_MOE
    busy: int = 0
    cases: tuple[Case, ...] = ()

    def __post_init__(self) -> None:
        for is_wrong, said in self._refusals():
            if is_wrong:
                raise BenchError(said)

    def _refusals(self) -> Iterator[tuple[object, str]]:
        suite, is_mla = self.suite, self.suite == MLA
        yield suite not in SUITES, f"the suite {suite!r} is unknown; allowed: {', '.join(SUITES)}"
        both = f"{self.shape!r} and {self.model!r}"
        yield (self.shape is None) == (self.model is None), f"give a shape or a model, one of them; got {both}"
        for option, what, names in (("kv", "caches", self.kvs), ("moe", "experts", self.moes)):
            given = ", ".join(names) or "none of them"
            is_wrong = not names or len(set(names)) < len(names)
            yield is_wrong, f"{option} must name different {what}, at least one; got {given}"
        is_wrong = bool(self.ragged) and suite not in ("prefill", HOST)
        yield is_wrong, f"ragged is for the suites prefill and host only, got the suite {suite!r}"
        against = "the suite mla is against DynamicCache, and its cases say its tokens; give nothing else"
        yield is_mla and (self.peers is not None or self.contexts), against
        is_wrong = is_mla and (not self.cases or len(set(self.cases)) < len(self.cases))
        yield is_wrong, f"give different cases, at least one; got {len(self.cases)}"
        yield not is_mla and self.cases, f"cases are for the suite mla only, got the suite {suite!r}"
        yield not (self.cases or self.contexts or self.ragged), "give a context, in tokens"
        left = f"leave layers ({self.layers}) and batch ({self.batch}) out"
        is_wrong = suite == MOE and (self.layers is not None or self.batch != 1)
        yield is_wrong, f"the suite moe calls one layer with tokens; {left}"
        sizes = {"layers": self.layers, "batch": self.batch, "steps": self.steps}
        sizes |= {"context": min(self.contexts, default=None), "ragged": min(self.ragged, default=None)}
        for name, size in sizes.items():
            yield size is not None and size < 1, f"{name} must be at least 1, got {size}"
            yield size is not None and size > MOST_SIZE, f"{name} must be at most {MOST_SIZE:,}, got {size}"
        busy = "busy must be at least 0, and in the suite memory, which has no times, 0"
        yield self.busy < 0 or (self.busy and suite == "memory"), f"{busy}; got {self.busy}"
        yield not 0 < self.seconds < math.inf, f"seconds must be above 0 and finite, got {self.seconds}"
        yield abs(self.seed) > MOST_SEED, f"seed must be from {-MOST_SEED:,} to {MOST_SEED:,}, got {self.seed:,}"

    def record(self) -> dict[str, Any]:
        """All of it by name, for a result; the cases of the suite mla only."""
        said = asdict(self)
        return said if self.cases else {name: value for name, value in said.items() if name != "cases"}
