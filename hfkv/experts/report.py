"""`MoEReport`: which experts of a model were changed, which were not, and why."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from hfkv.experts.offload.trace import ExpertTrace
from hfkv.sizes import about_bytes


@dataclass(frozen=True)
class Swap:
    """What became of the experts of one layer.

    Attributes:
        name: of the module.
        kind: its class.
        num_experts: E, those of this process.
        form: of the weights now: ``"plain"``, ``"packed"``, ``"int8"``, ``"int4"``, or one of these offloaded.
        why: the reason for that form.
        bytes_before, bytes_after: of the weights, on their device.
    """

    name: str
    kind: str
    num_experts: int
    form: str
    why: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class MoEReport:
    """The experts of a patched model.

    Attributes:
        swapped: layers whose experts are ours now.
        kept: other modules that look like experts, by name, with the reason why they run as before.
        trace: of offloaded experts: hits, misses, bytes that travelled, and, once ``trace.record()`` is called, who was
            chosen; else None.
    """

    swapped: tuple[Swap, ...]
    kept: dict[str, str]
    trace: ExpertTrace | None = None

    @property
    def bytes_before(self) -> int:
        """Of all experts' weights."""
        return sum(swap.bytes_before for swap in self.swapped)

    @property
    def bytes_after(self) -> int:
        """Of all experts' weights, as they are now."""
        return sum(swap.bytes_after for swap in self.swapped)

    def summary(self) -> str:
        """In a few words."""
        forms = ", ".join(sorted({swap.form for swap in self.swapped}))
        sizes = f"{about_bytes(self.bytes_before)} -> {about_bytes(self.bytes_after)}"
        return f"experts of {len(self.swapped)} layers {forms} ({sizes})"

    def __rich__(self) -> Table:
        table = Table(title="experts")
        for column in ("module", "class", "experts", "form", "bytes before", "bytes now", "why"):
            table.add_column(column, justify="right" if column.startswith(("experts", "bytes")) else "left")
        for s in self.swapped:
            sizes = about_bytes(s.bytes_before), about_bytes(s.bytes_after)
            table.add_row(s.name, s.kind, str(s.num_experts), s.form, *sizes, s.why)
        for name, why in self.kept.items():
            table.add_row(name, "", "", "as it was", "", "", why)
        table.add_section()
        table.add_row("all", "", "", "", about_bytes(self.bytes_before), about_bytes(self.bytes_after), "")
        return table

    def __str__(self) -> str:
        console = Console(width=160)
        with console.capture() as capture:
            console.print(self)
        return capture.get()
