"""What ``hfkv bench`` says below its tables: where it was measured, and what the columns are."""

from __future__ import annotations

from hfkv.bench import Result
from hfkv.bench.results import plural

# A load on the machine before a run that does not disturb it.
MOST_LOAD = 0.5
_BY_ALL_LAYERS = ("host", "step", "prefill", "reuse")


def caption(result: Result) -> dict[str, str]:
    """Notes by what they are about."""
    machine = result.machine
    place = machine["accelerator"] or f"{machine['processor']}, {machine['instructions']}"
    where = (
        f"{place}, {machine['device']}, {plural(machine['threads'], 'thread')}; hfkv {machine['hfkv']}, torch "
        f"{machine['torch']}, transformers {machine['transformers']}; {result.seconds:.0f} s"
    )
    notes = {"moe": _of_experts, "mla": _of_latents}.get(result.suite, _of_caches)(result)
    busy, load = result.setting.get("busy"), machine["load_before"]
    if busy:
        processes = f"{busy} other process{'es' if busy != 1 else ''}"
        notes["beside"] = f"{processes} that kept cores busy all the time (--busy), of {machine['cores']} cores"
    elif load is not None and load > MOST_LOAD:
        notes["beware"] = (
            f"there was a load of {load:.1f} on {machine['cores']} cores before the run: threads that wait for each "
            "other take many times as long as on an idle machine"
        )
    return {"where": where, **notes}


def _of_caches(result: Result) -> dict[str, str]:
    suite, notes = result.suite, {}
    if suite != "memory":
        what = {"attention": "one layer's update and attention", "step": "a decode step of generate()"}
        notes["median"] = f"of {what.get(suite, 'a prompt to its first new token')}; all caches take turns"
        notes["× peer"] = "the fastest peer's time by this one's: above 1 is faster than every peer"
    if result.has("floor_ms"):
        notes["× floor"] = (
            "its time by the time a copy of the bytes it must read would take; a copy reads and writes "
            f"{_speed(result)} here"
        )
        if result.bus_bytes_per_second:
            notes["× floor"] += f"; what is offloaded comes at {result.bus_bytes_per_second / 1e9:,.1f} GB/s"
    if suite == "host":
        notes["median"] = (
            "of the CPU time of a forward of one token, of which each turn takes the least of 16; all take turns"
        )
        notes["× Dynamic"] = "DynamicCache's time by this one's: above 1 is faster"
        del notes["× peer"]
        notes["first"] = "the least CPU time of generate() with one new token"
    notes["held"] = f"by {'all layers' if suite in _BY_ALL_LAYERS else 'one layer'}, in keys and values"
    notes["error"] = "of the logits against DynamicCache's, as norms"
    if suite == "attention":
        notes["error"] = (
            "of the attention, as norms: to fp32 attention over what it holds (own), and over the tokens it shows "
            "before they were encoded (full)"
        )
    if suite == "memory":
        notes["error"] = "not shown; the attention of every cache was checked against fp32"
        notes["peak"] = "the most allocated during one step of the layer, the cache included"
        notes[f"× {result.model_layers}"] = "held by the whole model"
    return notes


def _of_experts(result: Result) -> dict[str, str]:
    notes = {
        "median": "of one call of the experts; all take turns, and call with the same new random routing"
        + (". The device's time, of calls that are queued behind each other" if result.kind == "cuda" else "")
    }
    bases = list(dict.fromkeys(table.base for table in result.tables if table.base is not None))
    if bases:
        notes["× base"] = f"the time of {' or '.join(bases)} (see the column) by this one's: above 1 is faster"
    if result.has("lora_ratio"):
        notes["× LoRA"] = "its time by that of the same experts without adapters; PEFT's are around grouped_mm"
    if result.has("floor_ms"):
        notes["× floor"] = (
            "its time by that of a copy of the bytes of the experts that were chosen "
            f"({_speed(result)} here) or that of their products alone "
            f"({(result.operations_per_second or 0.0) / 1e9:,.0f} GFLOP/s), the longer of the two"
        )
    notes["held"] = "by the experts' weights, adapters included; plain: as transformers keeps them"
    notes["error"] = "of the output, as norms, to the same experts in fp32"
    # A codec that was asked for is in the contender's name.
    rows = [row for table in result.tables for row in table.rows if row.contender == "hfkv"]
    forms = dict.fromkeys(row.form for row in rows if row.form is not None)
    return {**notes, "hfkv": "; ".join(forms)} if forms else notes


def _of_latents(result: Result) -> dict[str, str]:
    parts = {case["part"] for case in result.setting["cases"]}
    notes = {
        "median": "of one call of one attention layer, from hidden states to hidden states, its cache's update "
        "included; in the part step of a decode step of generate(). All caches take turns"
        + (". A layer's is the device's time, of calls that are queued" if result.kind == "cuda" else ""),
        "× stock": "the time of transformers' own (DynamicCache, sdpa) by this one's: above 1 is faster",
    }
    if "crossover" in parts:
        notes["absorbed"] = "and expanded: hfkv's none made to attend in the one form or the other; none chooses"
    if result.has("floor_ms"):
        notes["× floor"] = (
            "its time by the time a copy of the bytes it must read would take, its cache and the weights; a copy reads "
            f"and writes {_speed(result)} here"
        )
    notes["held"] = "by one layer" + (", in the part step by all" if "step" in parts else "") + ", of latents"
    notes["error"] = (
        "of the output, the largest difference as a part of the largest number: to transformers' layer in fp32 over "
        "the latents before any codec (full), and over those it holds (own)"
    )
    if "step" in parts:
        notes["logits"] = "their difference to DynamicCache's, as norms"
    return notes


def _speed(result: Result) -> str:
    return f"{result.copy_bytes_per_second / 1e9:,.1f} GB/s"
