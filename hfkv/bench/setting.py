"""`Setting`: what a run measures; `Case`: a table of the suite ``mla``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hfkv.bench.errors import BenchError

MOE, MLA = "moe", "mla"
SUITES = ("attention", "step", "memory", "prefill", "reuse", MOE, MLA)
DEFAULT_KV = ("none", "int8", "int4", "fp8", "paged", "int8+paged", "window:1024")
GRAPHS_KV = ("none+graphs", "int8+graphs", "int8+paged+graphs")  # besides, for steps on a GPU
REUSE_KV = ("none", "none+reuse", "int8", "int8+reuse")  # of the suite reuse
MLA_KV = ("none", "int8", "int4", "paged")
DEFAULT_MOE = ("auto", "int8", "int4", "auto+lora")
DECODE, STEP, PREFILL, CROSSOVER = "decode", "step", "prefill", "crossover"
PARTS = (DECODE, STEP, PREFILL, CROSSOVER)
# Of the suite mla where nothing is said: tokens held, prompts, and new tokens at once.
HELD = {DECODE: 16_384, STEP: 8192, PREFILL: 8192, CROSSOVER: 4096}
PROMPTS = (256, 1024, 4096)
CHUNK = 512
QUERIES = (16, 32, 64, 128, 170, 256, 512)


@dataclass(frozen=True)
class Case:
    """One table of the suite ``mla``.

    Attributes:
        part: ``"decode"``, one layer and one new token; ``"step"``, a step of `generate`; ``"prefill"``, one layer that
            reads many at once; or ``"crossover"``, the same by absorbed and by expanded attention.
        held: tokens in the cache before.
        new: tokens of a call.
    """

    part: str
    held: int
    new: int

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


def cases_of(parts: Sequence[str], tokens: Sequence[int] = (), queries: Sequence[int] = ()) -> tuple[Case, ...]:
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
        held = tokens or [HELD.get(part, 1)]
        if part == PREFILL and not queries:
            cases += [Case(part, 0, length) for length in tokens or PROMPTS]
            cases += [] if tokens else [Case(part, HELD[part], CHUNK)]
        else:
            several = queries or QUERIES if part in (PREFILL, CROSSOVER) else (1,)
            cases += [Case(part, count, new) for count in held for new in several]
    return tuple(cases)


@dataclass(frozen=True)
class Setting:
    """What a run measures.

    Attributes:
        suite: a name in `SUITES`.
        shape: a name in `SHAPES`, in the suite moe in `MOE_SHAPES`, in mla in `MLA_SHAPES`; None with `model`.
        model: a folder or a name on the Hub, of which only the config is read; may be None.
        layers: layers to build or to take turns over; None for the suite's own choice. In mla: of the part step.
        contexts: tokens in the cache before a step, or of a prompt, or of a call in the suite moe; not in mla.
        batch: rows.
        ragged: real tokens of each row of one left-padded prompt, in place of `contexts` and `batch`; prefill only.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: such as ``"cpu"`` or ``"cuda:0"``.
        kvs: hfkv's contenders; not in the suite moe.
        peers: names in `PEERS`, in the suite moe in `MOE_PEERS`; None for all that can run. DynamicCache, there
            grouped_mm, is always among them.
        steps: timed steps of each contender; None for as many as fit in `seconds`.
        seconds: how long the contenders of one context take turns at least, filling their caches left out.
        seed: of the random keys, values, tokens and weights.
        moes: hfkv's contenders in the suite moe.
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
        if self.suite not in SUITES:
            raise BenchError(f"the suite {self.suite!r} is unknown; allowed: {', '.join(SUITES)}")
        if (self.shape is None) == (self.model is None):
            raise BenchError(f"give a shape or a model, one of them; got {self.shape!r} and {self.model!r}")
        for option, what, names in (("kv", "caches", self.kvs), ("moe", "experts", self.moes)):
            if not names or len(set(names)) < len(names):
                given = ", ".join(names) or "none of them"
                raise BenchError(f"{option} must name different {what}, at least one; got {given}")
        if self.ragged and self.suite != "prefill":
            raise BenchError(f"ragged is for the suite prefill only, got the suite {self.suite!r}")
        if self.suite == MLA:
            if self.peers is not None or self.contexts:
                raise BenchError(
                    "the suite mla is against DynamicCache, and its cases say its tokens; give nothing else"
                )
            if not self.cases or len(set(self.cases)) < len(self.cases):
                raise BenchError(f"give different cases, at least one; got {len(self.cases)}")
        elif self.cases:
            raise BenchError(f"cases are for the suite mla only, got the suite {self.suite!r}")
        elif not self.contexts and not self.ragged:
            raise BenchError("give a context, in tokens")
        if self.suite == MOE and (self.layers is not None or self.batch != 1):
            raise BenchError(
                f"the suite moe calls one layer with tokens; leave layers ({self.layers}) and batch ({self.batch}) out"
            )
        sizes = {"layers": self.layers, "batch": self.batch, "steps": self.steps}
        sizes |= {"context": min(self.contexts, default=None), "ragged": min(self.ragged, default=None)}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise BenchError(f"{name} must be at least 1, got {size}")
        if self.busy < 0 or (self.busy and self.suite == "memory"):
            raise BenchError(
                f"busy must be at least 0, and in the suite memory, which has no times, 0; got {self.busy}"
            )
        if not self.seconds > 0:
            raise BenchError(f"seconds must be above 0, got {self.seconds}")

    def record(self) -> dict[str, Any]:
        """All of it by name, for a result; the cases of the suite mla only."""
        said = asdict(self)
        return said if self.cases else {name: value for name, value in said.items() if name != "cases"}
