"""`Result`: what a run measured, as it is shown, written and read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hfkv.bench.record import check_fields, read_record
from hfkv.bench.setting import CROSSOVER, MLA, MOE, PREFILL, STEP, SUITES, BenchError, Case
from hfkv.policy.config import KVConfig

OK, WRONG, LEFT_OUT = "ok", "wrong", "left out"


@dataclass(frozen=True)
class Row:
    """One contender at one context. What was not measured is None.

    Attributes:
        contender: ``"int8+paged"``, as it was asked for, or a peer's name.
        status: ``"ok"``; ``"wrong"`` where its result does not stand the check, and nothing of its speed is said; or
            ``"left out"``.
        note: the reason where it is not ``"ok"``.
        p20_ms, p50_ms, p80_ms: the time of a step, from `num_samples`; in the suite attention of one layer's step.
        held_bytes: bytes of the tokens the cache holds; in the suites attention and memory of one layer; in the suite
            moe of the experts' weights. `allocated_bytes` are allocated for them.
        peak_bytes: the most that was allocated during one step, the cache included; suite memory only.
        read_bytes: what a step must read: those held, and in the suite step the weights; in the suite moe those of the
            experts that some token chose, the median of all calls. `bus_bytes` come from host memory, if any.
        floor_ms: the time a copy of `read_bytes` alone would take on this device, or one of `bus_bytes` to it, or
            `operations` at the fastest matrix product of the run; `floor_ratio` is `p50_ms` over it.
        speedup: the `p50_ms` of the table's `base`, or of the fastest peer, over this one's: above 1 is faster.
        error_twin: its attention against fp32 attention over the keys and values this cache decodes to, as norms.
        error_full: against fp32 attention over the keys and values before any codec; in moe against experts in fp32.
        error_logits: one forward's logits against DynamicCache's, as norms.
        operations: two for each number of a weight and token, in the suite moe.
        lora_ratio: `p50_ms` over that of the same experts without LoRA.
        form: how hfkv keeps the experts, and why.
        first_ms: the CPU time of a prompt and its first token; suite host only, where all times are CPU times.
    """

    contender: str
    is_ours: bool
    status: str = OK
    note: str | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    num_samples: int = 0
    held_bytes: int | None = None
    allocated_bytes: int | None = None
    peak_bytes: int | None = None
    read_bytes: int | None = None
    bus_bytes: int | None = None
    floor_ms: float | None = None
    floor_ratio: float | None = None
    speedup: float | None = None
    error_twin: float | None = None
    error_full: float | None = None
    error_logits: float | None = None
    operations: int | None = None
    lora_ratio: float | None = None
    form: str | None = None
    first_ms: float | None = None


@dataclass(frozen=True)
class Table:
    """All contenders at one context.

    Attributes:
        context: tokens in the cache, or of the longest prompt, or of a call in the suite moe.
        ragged: real tokens of each row of a left-padded prompt; empty where all are full.
        layers: layers that were measured.
        rows: peers first.
        base: the peer whose time is divided by the others' in the suite moe; None in others, or where it did not run.
    """

    context: int
    batch: int
    ragged: list[int]
    layers: int
    rows: list[Row]
    base: str | None = None

    def row(self, contender: str) -> Row | None:
        """The row of that name; hfkv's also by another spelling of the same config."""
        wanted = canonical(contender)
        return next((row for row in self.rows if canonical(row.contender) == wanted), None)


@dataclass(frozen=True)
class Result:
    """What a run measured.

    Attributes:
        date: when it ended, ISO 8601 with the zone.
        shape: the shape's name, or the model's, which has `model_layers`.
        setting: the whole `Setting`.
        machine: see `describe_machine`.
        copy_bytes_per_second: bytes read and written by a copy on the device, in this run.
        seconds: how long it took.
        tables: one a context.
        bus_bytes_per_second: from pinned host memory to the device, in this run; None without a GPU.
        operations_per_second: the speed of the fastest large matrix product in this run; suite moe only.
    """

    command: str
    date: str
    suite: str
    shape: str
    model_layers: int
    dtype: str
    seed: int
    setting: dict[str, Any]
    machine: dict[str, Any]
    copy_bytes_per_second: float
    seconds: float
    tables: list[Table]
    bus_bytes_per_second: float | None = None
    operations_per_second: float | None = None

    @property
    def kind(self) -> str:
        """The kind of device: ``"cpu"`` or ``"cuda"``."""
        return str(self.machine["device"]).partition(":")[0]

    def has(self, field: str) -> bool:
        """Whether a field of `Row` is known of any row."""
        return any(getattr(row, field) is not None for table in self.tables for row in table.rows)

    def case(self, table: Table) -> Case | None:
        """What a table of the suite mla is about; None in other suites, whose tables say it themselves."""
        if self.suite != MLA:
            return None
        index = next(index for index, other in enumerate(self.tables) if other is table)
        return Case(**self.setting["cases"][index])

    def about(self, table: Table) -> str:
        """The rows and tokens of a table, in words."""
        case, rows = self.case(table), f"{table.batch} × {table.context:,}"
        if table.ragged:
            return f"left-padded rows of {', '.join(f'{length:,}' for length in table.ragged)} tokens"
        if self.suite == MOE:
            return plural(table.context, "token")
        if case is None:
            return f"{rows} tokens"
        if case.part == STEP:
            return f"step of generate(), {rows} tokens held"
        if case.part == PREFILL and not case.held:
            return f"one layer, prompt of {rows} tokens"
        either = ", absorbed or expanded" if case.part == CROSSOVER else ""
        return f"one layer, {plural(case.new, 'new token')} over {rows} held{either}"

    @property
    def wrong(self) -> list[Row]:
        """Rows whose results do not stand the check."""
        return [row for table in self.tables for row in table.rows if row.status == WRONG]

    def write_json(self, path: Path) -> None:
        """Writes everything to a file."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def _check(self) -> None:
        """Raises ValueError where what a file said is of the right types and still no result."""
        if self.suite not in SUITES:
            raise ValueError(f"the suite {self.suite!r} is unknown; there are {', '.join(SUITES)}")
        if not self.tables:
            raise ValueError("it has no tables")
        check_fields(_MACHINE, self.machine, "machine", is_whole=True)
        check_fields({"busy": "int"}, self.setting, "setting")
        if self.suite == MLA:
            check_fields({"cases": "list[Any]"}, self.setting, "setting", is_whole=True)
            cases = [read_record(Case, case, "a case") for case in self.setting["cases"]]
            if len(cases) < len(self.tables):
                raise ValueError(f"setting names {plural(len(cases), 'case')} of {plural(len(self.tables), 'table')}")

    @classmethod
    def read_json(cls, path: Path) -> Result:
        """Reads what `write_json` wrote.

        Raises:
            BenchError: the file is not there or is something else.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            check_fields({"tables": "list[Any]"}, content, "the result", is_whole=True)
            tables = [_table(table, f"table {index}") for index, table in enumerate(content["tables"], start=1)]
            result = read_record(cls, content, "the result", tables=tables)
            result._check()
            return result
        except OSError as error:
            raise BenchError(f"{str(path)!r} could not be read: {error.strerror}; name a result of --json") from error
        except (ValueError, RecursionError) as error:
            raise BenchError(f"{str(path)!r} is no result that hfkv bench --json wrote: {error}") from error


# What is said of a machine.
_MACHINE = dict.fromkeys(("device", "processor", "instructions", "hfkv", "torch", "transformers"), "str")
_MACHINE |= {"threads": "int", "cores": "int | None", "accelerator": "str | None", "load_before": "float | None"}


def _table(value: Any, where: str) -> Table:
    check_fields({"rows": "list[Any]"}, value, where, is_whole=True)
    rows = [read_record(Row, row, f"{where}, row {index}") for index, row in enumerate(value["rows"], start=1)]
    table = read_record(Table, value, where, rows=rows)
    if not rows or min(table.context, table.batch, table.layers) < 1:
        raise ValueError(f"{where} must have a row, and a context, a batch and layers of at least 1")
    for row in rows:
        if row.status not in (OK, WRONG, LEFT_OUT):
            raise ValueError(f"{where}: the status {row.status!r} is unknown; there are {OK}, {WRONG}, {LEFT_OUT}")
        numbers = (value for value in vars(row).values() if isinstance(value, int | float))
        if any(number < 0 for number in numbers):
            raise ValueError(f"{where}: {row.contender!r} has a number below 0")
    return table


def plural(count: int, noun: str) -> str:
    """``"1 token"``, ``"2 tokens"``."""
    return f"{count:,} {noun}{'s' if count != 1 else ''}"


def canonical(contender: str) -> str:
    """One spelling for all strings of the same config; a peer's name as it is."""
    try:
        return str(KVConfig.parse(contender))
    except (TypeError, ValueError):
        return contender
