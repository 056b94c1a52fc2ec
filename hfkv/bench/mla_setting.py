"""`MLASetting`: what a run of the suite ``mla`` measures, a `Case` a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from hfkv.bench.errors import BenchError
from hfkv.bench.results import Result, Table
from hfkv.bench.setting import SUITES as OTHER_SUITES
from hfkv.bench.setting import Setting

MLA = "mla"
SUITES = (*OTHER_SUITES, MLA)
DECODE, STEP, PREFILL, CROSSOVER = "decode", "step", "prefill", "crossover"
PARTS = (DECODE, STEP, PREFILL, CROSSOVER)
MLA_KV = ("none", "int8", "int4", "paged")
MLA_LAYERS = 4  # of the model of the part step
# Tokens held, prompts, and new tokens at once.
HELD = {DECODE: 16_384, STEP: 8192, PREFILL: 8192, CROSSOVER: 4096}
PROMPTS = (256, 1024, 4096)
CHUNK = 512
QUERIES = (16, 32, 64, 128, 170, 256, 512)


@dataclass(frozen=True)
class Case:
    """One table of a run.

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
        elif part in (PREFILL, CROSSOVER):
            cases += [Case(part, count, new) for count in held for new in queries or QUERIES]
        else:
            cases += [Case(part, count, 1) for count in held]
    return tuple(cases)


@dataclass(frozen=True)
class MLASetting(Setting):
    """A `Setting` of the suite ``mla``: cases in place of contexts.

    Attributes:
        shape: a name in `MLA_SHAPES`.
        layers: of the model of the part step; None for `MLA_LAYERS`. The other parts have one layer.
        cases: what to measure, a table each.
    """

    suite: str = MLA
    kvs: tuple[str, ...] = MLA_KV
    cases: tuple[Case, ...] = cases_of(PARTS)

    def __post_init__(self) -> None:
        if self.suite != MLA:
            raise BenchError(f"an MLASetting is of the suite {MLA!r}, got {self.suite!r}")
        if self.peers is not None or self.contexts or self.ragged:
            raise BenchError("the suite mla is against DynamicCache, and its cases say its tokens; give nothing else")
        if not self.cases or len(set(self.cases)) < len(self.cases):
            raise BenchError(f"give different cases, at least one; got {len(self.cases)}")
        # What is said besides is as in the suites of caches.
        given = {field.name: getattr(self, field.name) for field in fields(Setting)}
        Setting(**{**given, "suite": "attention", "contexts": tuple(case.context for case in self.cases)})


def case_of(result: Result, table: Table) -> Case | None:
    """What a table of a result is about; None in other suites, whose tables say it themselves."""
    if result.suite != MLA:
        return None
    index = next(index for index, other in enumerate(result.tables) if other is table)
    return Case(**result.setting["cases"][index])
