"""What ``hfkv bench moe`` says around its tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hfkv.bench import Result, Table


def moe_title(result: Result, measured: Table) -> str:
    """Over a table: the layer and the tokens of a call."""
    from hfkv.bench import MOE_SHAPES

    tokens = f"{measured.context:,} token{'s' if measured.context != 1 else ''}"
    known = MOE_SHAPES.get(result.shape)
    return f"moe: {result.shape}{f' ({known})' if known else ''}, {result.dtype}, {tokens}"


def moe_notes(result: Result) -> dict[str, str]:
    """Below the tables: what their columns are."""
    rows = [row for table in result.tables for row in table.rows]
    is_queued = str(result.machine["device"]).startswith("cuda")
    notes = {
        "median": "of one call of the experts; all take turns, and call with the same new random routing"
        + (". The device's time, of calls that are queued behind each other" if is_queued else "")
    }
    bases = list(dict.fromkeys(table.base for table in result.tables if table.base is not None))
    if bases:
        notes["× base"] = f"the time of {' or '.join(bases)} (see the column) by this one's: above 1 is faster"
    if any(row.lora_ratio is not None for row in rows):
        notes["× LoRA"] = "its time by that of the same experts without adapters; PEFT's are around grouped_mm"
    if any(row.floor_ms is not None for row in rows):
        operations = result.operations_per_second or 0.0
        notes["× floor"] = (
            "its time by that of a copy of the bytes of the experts that were chosen "
            f"({result.copy_bytes_per_second / 1e9:,.1f} GB/s here) or that of their products alone "
            f"({operations / 1e9:,.0f} GFLOP/s), the longer of the two"
        )
    notes["held"] = "by the experts' weights, adapters included; plain: as transformers keeps them"
    notes["error"] = "of the output, as norms, to the same experts in fp32"
    # A codec that was asked for is in the contender's name.
    forms = dict.fromkeys(row.form for row in rows if row.form is not None and row.contender == "hfkv")
    if forms:
        notes["hfkv"] = "; ".join(forms)
    return notes
