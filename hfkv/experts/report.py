"""`MoEReport`: which experts of a model were changed, which were not, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfkv.experts.offload.trace import ExpertTrace
from hfkv.policy.ports import port
from hfkv.policy.units import about_bytes

if TYPE_CHECKING:
    from rich.table import Table
else:
    Table = Any  # for typing.get_type_hints, without the import

WIDTH = 160  # columns of text


@dataclass(frozen=True)
class Swap:
    """The change to the experts of one layer.

    Attributes:
        name: the module's name.
        kind: the module's class.
        num_experts: E, the experts of this process.
        form: the weights' form now: ``"plain"``, ``"packed"``, ``"int8"``, ``"int4"``, or one of these offloaded.
        why: the reason for that form.
        bytes_before, bytes_after: bytes of the weights, on their device.
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
        trace: for offloaded experts their hits, misses, bytes that travelled, and, once ``trace.record()`` is called,
            which were chosen; else None.
    """

    swapped: tuple[Swap, ...]
    kept: dict[str, str]
    trace: ExpertTrace | None = None

    @property
    def bytes_before(self) -> int:
        """The bytes of all experts' weights before the patch."""
        return sum(swap.bytes_before for swap in self.swapped)

    @property
    def bytes_after(self) -> int:
        """The bytes of all experts' weights, as they are now."""
        return sum(swap.bytes_after for swap in self.swapped)

    def summary(self) -> str:
        """The report in a few words."""
        forms = ", ".join(sorted({swap.form for swap in self.swapped}))
        sizes = f"{about_bytes(self.bytes_before)} -> {about_bytes(self.bytes_after)}"
        return f"experts of {len(self.swapped)} layers {forms} ({sizes})"

    def __rich__(self) -> Table:
        return port("experts_table")(self)

    def __str__(self) -> str:
        return port("plain_text")(self, WIDTH)
