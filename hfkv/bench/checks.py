"""Tables of ratios that results are held against: what `hfkv bench --check` reads."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from hfkv.bench.results import LEFT_OUT, OK, Result, Row, Table
from hfkv.bench.setting import MLA, PARTS, SUITES, BenchError

FLOOR, EVERY = "floor", "*"
HELD, MISSED, NOT_MEASURED = "held", "missed", "not measured"


@dataclass(frozen=True)
class Target:
    """One ratio, a table ``[[ratio]]`` of the file, about the runs that have what it says of them.

    Attributes:
        contender: a name; ``"*"`` for every one of hfkv's.
        against: whose time is divided by the contender's. With ``"floor"`` it is the contender's time that is divided,
            by its floor's.
        at_least: what the ratio must reach; with ``against = "floor"`` `at_most`, what it must not exceed.
        max_error: what the contender's error against fp32 attention over the unquantised must not exceed.
        max_held: what the bytes it holds, over those of `against`, must not exceed.
        device: ``"cpu"`` or ``"cuda"``.
        part, queries: the part of the suite mla, which has to be said there, and new tokens of a call.
        busy: other processes that kept cores busy, exactly so many.
    """

    suite: str
    contender: str
    context: int
    against: str = "DynamicCache"
    at_least: float | None = None
    at_most: float | None = None
    max_error: float | None = None
    shape: str | None = None
    batch: int | None = None
    ragged: list[int] | None = None
    dtype: str | None = None
    layers: int | None = None
    device: str | None = None
    max_held: float | None = None
    note: str | None = None
    part: str | None = None
    queries: int | None = None
    busy: int = 0

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise BenchError(f"the suite {self.suite!r} is unknown; allowed: {', '.join(SUITES)}")
        if self.suite == MLA and self.part not in PARTS:
            raise BenchError(f"the part {self.part!r} of the suite mla is unknown; allowed: {', '.join(PARTS)}")
        if self.suite != MLA and (self.part is not None or self.queries is not None):
            raise BenchError(f"part and queries are of the suite mla, got the suite {self.suite!r}; leave them out")
        if all(value is None for value in (self.at_least, self.at_most, self.max_error, self.max_held)):
            raise BenchError(f"{self} says neither at_least, at_most, max_error nor max_held")
        if self.max_held is not None and self.against == FLOOR:
            raise BenchError(f"{self} says max_held, and the floor holds nothing; name a row with against")
        wanted, other = ("at_most", "at_least") if self.against == FLOOR else ("at_least", "at_most")
        if getattr(self, other) is not None:
            raise BenchError(f"{self} says {other}; against {self.against!r} goes with {wanted}")

    def concerns(self, result: Result, table: Table) -> bool:
        """Whether it is about that run, its contexts aside."""
        of_result = {name: getattr(result, name) for name in ("suite", "shape", "dtype")}
        of_table = {name: getattr(table, name) for name in ("batch", "ragged", "layers")}
        seen = {**of_result, **of_table, "device": result.kind, "busy": result.setting.get("busy", 0)}
        case = result.case(table)
        if case is not None:
            seen |= {"part": case.part, "queries": case.new}
        return all(getattr(self, name) in (None, value) for name, value in seen.items())

    def __str__(self) -> str:
        words = self.part, self.shape, self.batch and f"batch {self.batch}"
        about = "".join(f" {word}" for word in words if word)
        queries = f", {self.queries:,} new" if self.queries else ""
        busy = f", {self.busy} busy beside it" if self.busy else ""
        return f"{self.suite}{about}, {self.context:,} tokens{queries}{busy}, {self.contender} over {self.against}"


@dataclass(frozen=True)
class Verdict:
    """A target and what was seen of it; None where nothing was, or nothing was asked for.

    Attributes:
        contender: a name in place of ``"*"``.
        verdict: ``"held"``, ``"missed"`` or ``"not measured"``: no result is of such a run, or the peer could not run,
            which `note` says.
        held: the part of the other's bytes that was seen.
        result: which of several results of such a run it is about, counted from 1; None where there is but one.
    """

    target: Target
    contender: str
    ratio: float | None
    error: float | None
    verdict: str
    note: str | None = None
    held: float | None = None
    result: int | None = None


def read_targets(path: Path) -> list[Target]:
    """The targets of a TOML file.

    Raises:
        BenchError: it could not be read, or an entry is unknown, incomplete or contradicts itself.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"{str(path)!r} could not be read: {error.strerror}; name a TOML file of ratios") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BenchError(f"{str(path)!r} is not TOML: {error}") from error
    entries = content.pop("ratio", None)
    if content or not isinstance(entries, list) or not entries:
        unknown = f"; got {', '.join(content)}" if content else ""
        raise BenchError(f"{str(path)!r} must hold tables [[ratio]], at least one, and nothing else{unknown}")
    return [_target(entry, f"{str(path)!r}, ratio {index}") for index, entry in enumerate(entries, start=1)]


_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "list[int]": (list,)}


def _target(entry: dict[str, Any], where: str) -> Target:
    allowed = {field.name: str(field.type) for field in fields(Target)}
    for name, value in entry.items():
        if name not in allowed:
            raise BenchError(f"{where}: {name!r} is unknown; allowed: {', '.join(allowed)}")
        kind = allowed[name].split(" ")[0]
        if not isinstance(value, _KINDS[kind]) or isinstance(value, bool):
            raise BenchError(f"{where}: {name} must be of type {kind}, got {value!r}")
    missing = [name for name in ("suite", "contender", "context") if name not in entry]
    if missing:
        raise BenchError(f"{where} lacks {', '.join(missing)}")
    try:
        return Target(**entry)
    except BenchError as error:
        raise BenchError(f"{where}: {error}") from error


def check_results(targets: Sequence[Target], results: Sequence[Result]) -> list[Verdict]:
    """Holds results against targets: each result of a run that a target is about, with a verdict of its own.

    Raises:
        BenchError: a row that a target names is not in a result of such a run, or no target is about any of the
            results.
    """
    verdicts = [verdict for target in targets for verdict in _verdicts(target, results)]
    if all(verdict.verdict == NOT_MEASURED and verdict.note is None for verdict in verdicts):
        runs = {f"{result.suite} {result.shape} {result.dtype} on {result.kind}" for result in results}
        raise BenchError(
            f"none of the {len(targets)} targets is about these results ({'; '.join(sorted(runs))}): the first is "
            f"{targets[0]}"
        )
    return verdicts


def _verdicts(target: Target, results: Sequence[Result]) -> list[Verdict]:
    runs = enumerate(results, start=1)
    about = [(run, table) for run, result in runs for table in result.tables if target.concerns(result, table)]
    if not about:
        return [Verdict(target, target.contender, None, None, NOT_MEASURED)]
    tables = [(run, table) for run, table in about if table.context == target.context]
    if not tables:
        there = ", ".join(f"{table.context:,}" for _, table in about)
        raise BenchError(f"{target}: the result has no context of {target.context:,} tokens; it has {there}")
    found = []
    for run, table in tables:
        is_every = target.contender == EVERY
        rows = [row for row in table.rows if row.is_ours] if is_every else [_row(target, target.contender, table)]
        verdicts = (_verdict(target, row, table) for row in rows)
        found += [replace(verdict, result=run if len(tables) > 1 else None) for verdict in verdicts]
    return found


def _row(target: Target, name: str, table: Table) -> Row:
    row = table.row(name)
    if row is None:
        there = ", ".join(row.contender for row in table.rows)
        raise BenchError(f"{target}: the result has no row {name!r}; it has {there}")
    return row


def _verdict(target: Target, row: Row, table: Table) -> Verdict:
    ratio, held, error = row.floor_ratio, None, row.error_full if target.max_error is not None else None
    if target.against != FLOOR:
        other = _row(target, target.against, table)
        if other.status == LEFT_OUT:
            return Verdict(target, row.contender, None, None, NOT_MEASURED, f"{other.contender}: {other.note}")
        ratio = other.p50_ms / row.p50_ms if other.p50_ms and row.p50_ms else None
        if target.max_held is not None:
            held = row.held_bytes / other.held_bytes if row.held_bytes and other.held_bytes else None
    is_held = row.status == OK and (target.at_least is None or (ratio is not None and ratio >= target.at_least))
    for seen, most in ((ratio, target.at_most), (error, target.max_error), (held, target.max_held)):
        is_held &= most is None or (seen is not None and seen <= most)
    return Verdict(target, row.contender, ratio, error, HELD if is_held else MISSED, held=held)
