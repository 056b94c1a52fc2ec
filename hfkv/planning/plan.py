"""`MemoryPlan`: what a model's weights and caches take, what of it fits, and what to choose."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from hfkv.measure.machine import free_bytes
from hfkv.planning.asked import asked_footprints
from hfkv.planning.fit import MOST_TOKENS, Fit, Planner, largest_that, most_context, resolve
from hfkv.planning.footprint import Footprint
from hfkv.planning.recommendation import Recommendation, least_lossy_codecs, recommend
from hfkv.planning.speeds import Speeds
from hfkv.planning.tokens import check_count, read_tokens
from hfkv.planning.weights import Weights, loaded_weights, stacked_experts
from hfkv.policy.config import KVConfig
from hfkv.policy.ports import port
from hfkv.policy.units import about_bytes, read_bytes

if TYPE_CHECKING:
    from rich.console import Group
else:
    Group = Any  # for typing.get_type_hints, without the import

# What CUDA's context, its libraries and the allocator's rounding take of an accelerator's memory besides.
DEVICE_OVERHEAD = 512 * 2**20
DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class PlannedCache:
    """A cache for the planned context and batch.

    Attributes:
        kv: the cache's config, in words.
        kv_bytes: bytes allocated while it decodes, on all devices: what `cache.nbytes()` will say.
        device_bytes: the most bytes on the device, while the prompt is read or after.
        host_bytes: bytes in host memory.
        read_bytes: bytes that a step reads.
        fits: whether it fits beside each of the weights.
        total_bytes: bytes on the device, with the chosen weights, activations and overhead.
        largest_context: the most tokens a row that fit with the chosen weights and planned batch; 0 where none do.
        largest_batch: the most rows that fit with the chosen weights and planned context; 0 where none do.
        floor_ms: the least time of a decode step with the chosen weights; None where the bandwidth is not known.
    """

    kv: str
    kv_bytes: int
    device_bytes: int
    host_bytes: int
    read_bytes: int
    fits: dict[str, bool]
    total_bytes: int
    largest_context: int
    largest_batch: int
    floor_ms: float | None


@dataclass(frozen=True)
class MemoryPlan:
    """What fits where; see `memory_plan`.

    Attributes:
        model: the model's name.
        dtype: the dtype of keys, values and unquantised weights.
        device: the type of device that is planned for.
        memory_bytes, memory_source: the limit, and where it is from.
        context, most_context, batch: tokens of a row; the most the model was made for, None without a limit; rows.
        weights: the weights in every precision.
        chosen: the name of the weights that totals, largest contexts and times are for.
        activation_bytes: bytes of activations, beside weights and cache.
        overhead_bytes: bytes of the device's own.
        speeds: the speeds that floors are worked out from.
        caches: the caches that were asked for.
        recommended: what to choose; None where nothing fits.
        notes: what else there is to know.
    """

    model: str
    dtype: str
    device: str
    memory_bytes: int
    memory_source: str
    context: int
    most_context: int | None
    batch: int
    weights: tuple[Weights, ...]
    chosen: str
    activation_bytes: int
    overhead_bytes: int
    speeds: Speeds
    caches: tuple[PlannedCache, ...]
    recommended: Recommendation | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        weights = [{**asdict(each), "read_bytes": each.read(self.batch)} for each in self.weights]
        return {**asdict(self), "weights": weights}

    def __rich__(self) -> Group:
        return port("plan_tables")(self)

    def __str__(self) -> str:
        return port("plain_text")(self)


def memory_plan(
    model: Any,
    memory: int | str | None = None,
    context: int | str | None = None,
    batch: int = 1,
    *,
    reply: int | None = None,
    kv: KVConfig | str | Iterable[KVConfig | str] | None = None,
    weights: str = "auto",
    dtype: torch.dtype | None = None,
    device: str | None = None,
    bandwidth: float | str | None = None,
    bus: float | str | None = None,
) -> MemoryPlan:
    """Says what fits, from a model's config alone: no weights are read.

    Args:
        model: a model, a config, the name of a shape (``"llama-8b"``; see `hfkv.bench`), a folder, or a name on the
            Hub. Of a model, the weights as they were loaded are planned with too.
        memory: bytes of the device for everything, a number or ``"24GiB"``; None is what is free on this machine's.
        context: tokens of each row, prompt and reply together, a number or ``"128k"``; None is the model's most.
        batch: rows; beams count.
        reply: how many of the tokens are generated, one by one; the spare room behind a window depends on it. None
            plans the most that any reply takes.
        kv: the cache to plan, or several; None for a list of usual ones. Of several, those that the model cannot have
            are left out, with a note.
        weights: ``"auto"`` (those as loaded, or the least lossy that fit), or the name of a precision.
        dtype: the dtype of keys, values and unquantised weights; None for the model's, or bfloat16.
        device: ``"cuda"`` or ``"cpu"``: page sizes and offloading differ. None is an accelerator where `memory` is
            given, else this machine's.
        bandwidth: bytes a second that the device reads, a number or ``"4.3TB/s"``; None is measured by a copy where
            such a device is on this machine: else there are no floors.
        bus: bytes a second to the device from host memory, likewise; assumed where there is no GPU to measure it.

    Raises:
        TypeError, ValueError: naming what was given and what is allowed.
    """
    source = resolve(model)
    check_count("batch", batch)
    if reply is not None:
        check_count("reply", reply)
    tokens = None if context is None else read_tokens("context", context)
    planner = Planner.of(source, dtype, _device(device, memory), reply)
    most = most_context(planner.geometry.config)
    context = tokens or most
    if context is None:
        raise ValueError("the model names no longest context (max_position_embeddings): give context= (--context)")
    if reply is not None and reply > context:
        raise ValueError(f"reply must be a part of the context, {context:,} tokens, got {reply:,}")
    notes = list(planner.geometry.notes)
    if most is not None and context > most:
        notes.append(
            f"{context:,} tokens are more than the model was made for ({most:,}): the longest contexts, too, are those "
            "that fit, whatever the model was made for"
        )
    footprints = asked_footprints(planner, kv, notes)
    all_weights = {
        **planner.weights,
        **({"loaded": loaded_weights(source)} if isinstance(source, torch.nn.Module) else {}),
    }
    if weights not in ("auto", *all_weights):
        raise ValueError(_unknown_weights(weights, all_weights))
    stacks = stacked_experts(planner.geometry.skeleton)
    if stacks:
        notes.append(
            f"bitsandbytes leaves the experts, {about_bytes(stacks)} in stacks of one parameter a layer, unquantised"
        )
    limit = free_bytes(_here()) if memory is None else read_bytes("memory", memory)
    overhead = 0 if memory is None or planner.device.type == "cpu" else DEVICE_OVERHEAD
    fit = Fit(planner, limit - overhead, most if most is not None and context <= most else None)
    names = [weights] if weights != "auto" else ["loaded"] if "loaded" in all_weights else list(planner.weights)
    recommended = recommend(
        footprints, names, lambda name, footprint: fit.holds(all_weights[name], footprint, context, batch)
    )
    chosen = recommended.weights if recommended else names[-1]
    speeds = Speeds.of(bandwidth, bus, planner.device)
    if speeds.bandwidth is None:
        notes.append(f"no floors: {speeds.bandwidth_source}")
    caches = tuple(
        _planned(text, footprint, all_weights, chosen, fit, speeds, context, batch)
        for text, footprint in footprints.items()
    )
    return MemoryPlan(
        model=os.fspath(model) if isinstance(model, str | os.PathLike) else planner.geometry.config.model_type,
        dtype=str(planner.dtype).removeprefix("torch."),
        device=planner.device.type,
        memory_bytes=limit,
        memory_source="free on this machine" if memory is None else "as given",
        context=context,
        most_context=most,
        batch=batch,
        weights=tuple(all_weights.values()),
        chosen=chosen,
        activation_bytes=planner.activation_bytes(context, batch),
        overhead_bytes=overhead,
        speeds=speeds,
        caches=caches,
        recommended=recommended,
        notes=tuple(notes),
    )


def least_lossy(
    model: Any, budget: int | str, context: int | str, batch: int = 1, *, offload: bool = False
) -> KVConfig:
    """Finds the config that `KVConfig.for_budget` describes, for a loaded model's device or an accelerator.

    With `offload` the buffers through which tokens come back, 96 MiB at most, are on the device besides the budget.
    """
    num_bytes = read_bytes("budget", budget)
    context = read_tokens("context", context)
    check_count("batch", batch)
    source = resolve(model)
    place = getattr(source, "device", None) if isinstance(source, torch.nn.Module) else None
    device = place if isinstance(place, torch.device) and place.type != "meta" else torch.device("cuda")
    planner = Planner.of(source, None, device)
    footprints = {codec: planner.footprint(KVConfig(codec=codec)) for codec in least_lossy_codecs()}
    fitting = [codec for codec, footprint in footprints.items() if footprint.of(context, batch).peak <= num_bytes]
    if offload and "none" not in fitting:
        return _offloaded(planner, device, num_bytes)
    if fitting:
        return KVConfig(codec=fitting[0])
    smallest = min(footprints, key=lambda codec: footprints[codec].of(context, batch).peak)
    needed = footprints[smallest].of(context, batch).peak
    largest = largest_that(lambda tokens: footprints[smallest].of(tokens, batch).peak <= num_bytes, MOST_TOKENS)
    window = 1 << max(context // 4, 1).bit_length() - 1
    raise ValueError(
        f"no codec holds {batch} × {context:,} tokens in {about_bytes(num_bytes)}: {smallest} needs "
        f"{about_bytes(needed)} ({needed:,} bytes), and {largest:,} tokens a row are the most that fit. Give that "
        f"budget, shorten the context, let a window forget (KVConfig(window={window})), or keep the bytes in host "
        "memory (offload=True)"
    )


def _offloaded(planner: Planner, device: torch.device, budget: int) -> KVConfig:
    """The config that keeps that many bytes on the device, and the rest in host memory."""
    least = Footprint(planner.geometry, KVConfig(offload=True), device)
    if not least.is_offloaded:
        raise ValueError(
            f"offload saves nothing where memory is one: on {device.type} nothing moves. Leave offload out, for a "
            "codec that fits, or move the model to an accelerator first"
        )
    if budget < least.least_budget:
        raise ValueError(
            f"budget must be at least {least.least_budget:,} bytes with offload=True, a page of every layer, got "
            f"{budget:,}"
        )
    return KVConfig(offload=True, device_budget=budget)


def _unknown_weights(given: str, known: Iterable[str]) -> str:
    said = f"weights {given!r} is unknown; allowed: auto, {', '.join(known)}"
    return f"{said}. For {given} give dtype={DTYPE_NAMES[given]} (--dtype) too" if given in DTYPE_NAMES else said


def _here() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _device(name: str | None, memory: int | str | None) -> torch.device:
    if name is None:
        return torch.device("cuda") if memory is not None else _here()
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f'device must be "cuda" or "cpu", got {name!r}') from error


def _planned(
    text: str,
    footprint: Footprint,
    weights: dict[str, Weights],
    chosen: str,
    fit: Fit,
    speeds: Speeds,
    context: int,
    batch: int,
) -> PlannedCache:
    whole, away = footprint.of(context, batch), footprint.offloaded(context, batch)
    beside = weights[chosen]
    on_device = footprint.on_device(context, batch)
    # Of what is offloaded, a device_budget keeps a part on the device; the rest travels at every step.
    travels = max(away.held - int(footprint.kv.device_budget or 0), 0)
    floor_ms = None
    if speeds.bandwidth is not None:
        floor_ms = 1e3 * max((beside.read(batch) + whole.held) / speeds.bandwidth, travels / speeds.bus)
    return PlannedCache(
        kv=text,
        kv_bytes=whole.allocated,
        device_bytes=on_device,
        host_bytes=away.allocated,
        read_bytes=whole.held,
        fits={name: fit.holds(each, footprint, context, batch) for name, each in weights.items()},
        total_bytes=fit.total(beside, footprint, context, batch),
        largest_context=fit.largest_context(beside, footprint, batch),
        largest_batch=fit.largest_batch(beside, footprint, context),
        floor_ms=floor_ms,
    )
