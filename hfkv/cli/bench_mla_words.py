"""What ``hfkv bench mla`` says around its tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hfkv.bench import Result, Table


def mla_title(result: Result, measured: Table) -> str:
    """Over a table: the shape, and what was read over what."""
    from hfkv.bench import MLA_SHAPES
    from hfkv.bench.mla_setting import STEP, case_of
    from hfkv.bench.plots import case_title

    case = case_of(result, measured)
    assert case is not None
    layers = f", {measured.layers} layer{'s' if measured.layers != 1 else ''}" if case.part == STEP else ""
    known = MLA_SHAPES.get(result.shape)
    shape = f"{result.shape}{f' ({known})' if known else ''}"
    return f"mla {case.part}: {shape}, {result.dtype}\n{case_title(case, measured.batch)}{layers}"


def mla_notes(result: Result) -> dict[str, str]:
    """Below the tables: what their columns are."""
    from hfkv.bench.mla_setting import CROSSOVER, STEP, case_of

    rows = [row for table in result.tables for row in table.rows]
    cases = [case_of(result, table) for table in result.tables]
    parts = {case.part for case in cases if case is not None}
    is_queued = str(result.machine["device"]).startswith("cuda")
    notes = {
        "median": "of one call of one attention layer, from hidden states to hidden states, its cache's update "
        "included; in the part step of a decode step of generate(). All caches take turns"
        + (". A layer's is the device's time, of calls that are queued" if is_queued else ""),
        "× stock": "the time of transformers' own (DynamicCache, sdpa) by this one's: above 1 is faster",
    }
    if CROSSOVER in parts:
        notes["absorbed"] = "and expanded: hfkv's none made to attend in the one form or the other; none chooses"
    if any(row.floor_ms is not None for row in rows):
        notes["× floor"] = (
            "its time by the time a copy of the bytes it must read would take, its cache and the weights; a copy reads "
            f"and writes {result.copy_bytes_per_second / 1e9:,.1f} GB/s here"
        )
    notes["held"] = "by one layer" + (", in the part step by all" if STEP in parts else "") + ", of latents"
    notes["error"] = (
        "of the output, the largest difference as a part of the largest number: to transformers' layer in fp32 over "
        "the latents before any codec (full), and over those it holds (own)"
    )
    if STEP in parts:
        notes["logits"] = "their difference to DynamicCache's, as norms"
    return notes
