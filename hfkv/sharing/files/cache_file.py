"""`save_cache` and `load_cache`: everything a cache holds, in a safetensors file that is checked before it is used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, cache_utils

from hfkv.cache.kv_cache import KVCache
from hfkv.cache.layers.base import CacheLayer
from hfkv.cache.layers.contents import Contents
from hfkv.cache.layers.layer import KVLayer
from hfkv.models.fingerprint import Fingerprint, fingerprint_difference, fingerprint_of
from hfkv.models.key_means import means_of
from hfkv.models.parallel import own_layers
from hfkv.models.probe import base_model, probe_rotary
from hfkv.sharing.files.devices import device_of, devices_of
from hfkv.sharing.files.header import VERSION, FileHeader, LeafHeader, NotRegisteredError, canonical, read_json
from hfkv.sharing.files.tensor_file import digest_of, read_file, write_file
from hfkv.sharing.refusals import check_files_hold

_Kind = tuple[torch.dtype, tuple[int, ...]]  # of a tensor

_AGAIN = "Use a whole copy of the file, or read the text again and save that cache"


def save_cache(cache: KVCache, path: str | os.PathLike[str], model: Any = None) -> None:
    """Writes what `cache` holds to a file, bit for bit, with its tokens and the fingerprint of the model.

    The file is written beside `path` and takes its place when it is complete.

    Args:
        cache: a used cache.
        path: a safetensors file.
        model: the model that filled the cache. Needed where it was not patched then; checked where it was.

    Raises:
        TypeError: `path` is no path, or `model` no transformers model.
        ValueError: the cache is empty, has layers of transformers' own or a schedule of your own, or was filled by
            another model than `model` or by one that is not known.
        NotImplementedError: a layer keeps more than tokens (`CacheLayer.file_refusal`), which no file holds.
        RuntimeError: a forward has failed midway and left the cache in pieces.
        OSError: the file cannot be written.
    """
    name = _file_name(path)
    filled_by = cache.record.state
    _check_complete(cache, filled_by.object() if model is None and filled_by and filled_by.object else model)
    fingerprint = _fingerprint(cache, model)
    leaves, tensors = _leaves_and_tensors(cache)
    header = FileHeader(cache.kv, cache.model_type, len(cache.layers), leaves, fingerprint).to_json()
    write_file(name, tensors, canonical({**header, "digest": digest_of(canonical(header), tensors)}))


def load_cache(path: str | os.PathLike[str], model: Any) -> KVCache:
    """Reads what `save_cache` wrote, as a cache that goes on where the saved one was.

    All of the file is checked before anything of it is used: its digest, the model, every shape. The digest tells
    damage and edits, not who wrote the file.

    Args:
        path: the file.
        model: the model that filled the cache, patched or not, or a `PeftModel` around it.

    Returns:
        A cache for `model`, each layer on the device of the layer's weights.

    Raises:
        TypeError: `path` is no path, or `model` no transformers model.
        ValueError: the file is not whole, not of this format, or of a newer version, or was filled by another model.
        NotImplementedError: a layer of the model's caches keeps more than tokens, which no file holds.
        FileNotFoundError: there is no such file.
    """
    name, base = _file_name(path), _base_of(model)
    try:
        tensors, text = read_file(name)
        given = read_json(text)
        if given["version"] == VERSION:
            digest = given.pop("digest", None)
            if digest_of(canonical(given), tensors) != digest:
                raise ValueError("it is damaged or was edited: its digest is not that of what it holds")
            header = FileHeader.from_json(given)
    except (ValueError, RecursionError) as error:
        remedy = "" if isinstance(error, NotRegisteredError) else f". {_AGAIN}"
        raise ValueError(f"{name} cannot be loaded: {error}{remedy}") from error
    if given["version"] != VERSION:
        raise ValueError(
            f"{name} is of version {given['version']:,} of the format, and this hfkv reads {VERSION}: update hfkv"
        )
    state = _fingerprint_of(base)
    difference = fingerprint_difference(header.fingerprint, state.fingerprint())
    if difference is not None:
        raise ValueError(
            f"{name} was filled by {difference}; this model would go on from keys and values that are not its own. "
            "Load it for the model that filled it, put the weights or adapters back, or read the text again"
        )
    try:
        cache = KVCache(base, header.kv, base.hfkv.rotary if "hfkv" in vars(base) else None, {})
        check_files_hold(cache)
        contents = _contents(cache, header, tensors, base)
    except ValueError as error:
        raise ValueError(f"{name} cannot be loaded for {type(base).__name__}: {error}. {_AGAIN}") from error
    _take_means(cache, contents, base)
    for number, of_leaf in contents.items():
        cache.leaves[number].adopt(of_leaf)
    _write_down(cache, tensors, state, base)
    return cache


def _take_means(cache: KVCache, contents: Mapping[int, Contents], model: PreTrainedModel) -> None:
    """Gives the leaves of an empty cache the means that were taken off the keys in a file, or none."""
    layers = [index for index, _ in _leaves(cache)]
    vectors = {number: each.mean for number, each in contents.items() if each.mean is not None}
    rotary = probe_rotary(model, sliding=True) if vectors else {}
    means = means_of(vectors, {number: rotary[layers[number]] for number in vectors})
    cache.takes_mean = bool(means)
    for number, leaf in enumerate(cache.leaves):
        leaf.mean = means.get(number)


def _check_complete(cache: KVCache, model: Any) -> None:
    """Raises unless all that the cache holds for `model` is known, and is ours."""
    dummy = getattr(cache_utils, "DummyLayer", KVLayer)
    others = [layer for layer in cache.layers if not isinstance(layer, (CacheLayer, dummy))]
    if others:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in others}))
        raise ValueError(
            f"this cache has layers that stay transformers' own ({kinds}), which cannot be saved; keep the text instead"
        )
    broken = cache.record.broken
    for leaf in cache.leaves:
        leaf._assignment.check_complete()
    # A stage of a pipeline fills its own layers only.
    own = own_layers(base_model(model), len(cache.layers))
    if broken is None and len({leaf.get_seq_length() for index, leaf in _leaves(cache) if index in own}) > 1:
        broken = "nobody wrote down how"
    if broken is not None:
        raise RuntimeError(
            f"a forward of this cache failed midway ({broken}): its layers hold different tokens. Call cache.reset() "
            "and prefill again"
        )
    if not cache.get_seq_length():
        raise ValueError("this cache is empty: nothing has been seen that could be saved; fill it first")
    check_files_hold(cache)


def _fingerprint(cache: KVCache, model: Any) -> Mapping[str, str]:
    """The fingerprint of the model that filled the cache."""
    filled_by = cache.record.state
    if model is None:
        if filled_by is None:
            raise ValueError(
                "this cache was filled by a model that was not patched, so nobody knows which; give it: "
                "cache.save(path, model)"
            )
        return filled_by.fingerprint()
    now = _fingerprint_of(_base_of(model))
    difference = None if filled_by is None else filled_by.difference(now)
    if difference is not None:
        raise ValueError(
            f"this cache was filled by {difference}; give the model as it was then, or leave it out: cache.save(path)"
        )
    return now.fingerprint()


def _leaves_and_tensors(cache: KVCache) -> tuple[tuple[LeafHeader | None, ...], dict[str, torch.Tensor]]:
    """What the header says of each leaf, and all that the file holds, contiguous and on the CPU."""
    leaves: list[LeafHeader | None] = []
    tensors = {}
    for index, leaf in enumerate(cache.leaves):
        contents = leaf.contents()
        if contents is None:
            leaves.append(None)
            continue
        parts = contents.parts
        place = contents.seen, contents.gone_below, contents.pads, contents.origins
        leaves.append(LeafHeader(parts["key"], parts["value"], *place))
        if contents.mean is not None:
            tensors[f"{index}.mean"] = contents.mean.cpu()
        for kind, planes in (("slots", contents.slots or ()), ("tokens", contents.tokens)):
            for number, plane in enumerate(planes):
                if kind == "tokens" or plane.shape[2]:
                    tensors[f"{index}.{kind}.{number}"] = plane.cpu().contiguous()
    ids, hidden = cache.holds_tokens, cache.record.hidden()
    if ids is not None:
        tensors["ids"] = ids
        if hidden is not None and bool(hidden.any()):
            tensors["padding"] = hidden
    return tuple(leaves), tensors


def _contents(
    cache: KVCache, header: FileHeader, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel
) -> dict[int, Contents]:
    """What the leaves of an empty cache are to hold, by their number.

    Raises:
        ValueError: header and tensors are not those of such a cache.
    """
    leaves = _leaves(cache)
    own, devices = own_layers(model, len(cache.layers)), devices_of(model, len(cache.layers))
    held_leaves = [leaf for leaf in header.leaves if leaf is not None]
    checks: tuple[tuple[str, Any, Any], ...] = (
        ("model type", header.model_type, cache.model_type),
        ("number of layers", header.num_layers, len(cache.layers)),
        ("number of layers", len(header.leaves), len(leaves)),
        ("number of layers held", len(held_leaves), sum(index in own for index, _ in leaves)),
        ("number of different lengths", len({(leaf.seen, len(leaf.pads)) for leaf in held_leaves}), 1),
    )
    for what, saved, expected in checks:
        if saved != expected:
            raise ValueError(f"its {what} is {saved} and should be {expected}")
    seen, batch = held_leaves[0].seen, len(held_leaves[0].pads)
    wanted: dict[str, _Kind] = {"ids": (torch.int64, (batch, seen))} if "ids" in tensors else {}
    if "ids" in tensors and "padding" in tensors:
        wanted["padding"] = (torch.bool, (batch, seen))
    for number, ((index, leaf), of_leaf) in enumerate(zip(leaves, header.leaves, strict=True)):
        if of_leaf is None:
            continue
        if index not in own:
            raise ValueError(f"it holds layer {index}, which another stage of the pipeline computes")
        if f"{number}.mean" in tensors:
            wanted[f"{number}.mean"] = (torch.float32, (of_leaf.key.heads, of_leaf.key.head_dim))
        for kind, planes in _planes(leaf, of_leaf).items():
            wanted |= {f"{number}.{kind}.{plane_idx}": plane for plane_idx, plane in enumerate(planes)}
    found: dict[str, _Kind] = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(f"its tensor {name!r} is {found.get(name)} and should be {wanted.get(name)}")

    def held(number: int, kind: str) -> tuple[torch.Tensor, ...]:
        names = (f"{number}.{kind}.{index}" for index in range(len(wanted)))
        return tuple(tensors[name] for name in names if name in wanted)

    return {
        number: Contents(
            {"key": of_leaf.key, "value": of_leaf.value},
            devices[index],
            held(number, "slots") or None,
            held(number, "tokens"),
            seen,
            of_leaf.gone_below,
            of_leaf.pads,
            of_leaf.origins,
            tensors.get(f"{number}.mean"),
        )
        for number, ((index, _), of_leaf) in enumerate(zip(leaves, header.leaves, strict=True))
        if of_leaf is not None
    }


def _leaves(cache: KVCache) -> list[tuple[int, KVLayer]]:
    """The leaves of a cache, each with the index of its layer."""
    ours = ((index, layer) for index, layer in enumerate(cache.layers) if isinstance(layer, CacheLayer))
    return [(index, leaf) for index, layer in ours for leaf in layer.leaves]


def _planes(leaf: KVLayer, header: LeafHeader) -> dict[str, list[_Kind]]:
    """The dtype and shape of every plane that a leaf is to hold."""
    window = leaf.window
    if window is None and header.gone_below:
        raise ValueError("tokens are gone from a layer that has no window")
    num_slots, held_from = (window.num_slots, window.held_from(header.gone_below)) if window else (0, 0)
    planes: list[tuple[torch.dtype, int, int]] = []
    for part, codec in ((header.key, leaf.codecs.key), (header.value, leaf.codecs.value)):
        # No token, but in the dtypes and widths that the codec writes.
        encoded = codec.encode(torch.empty(1, 1, 0, part.head_dim, dtype=part.dtype))
        span = slice(0, len(encoded)) if part is header.key else slice(len(planes), None)
        if part.planes != span:
            raise ValueError(f"its planes {part.planes} should be {span}")
        planes += [(plane.dtype, part.heads, plane.shape[3]) for plane in encoded]
    batch = len(header.pads)
    counts = {"slots": num_slots, "tokens": header.seen - held_from}
    return {
        kind: [(dtype, (batch, heads, count, width)) for dtype, heads, width in planes]
        for kind, count in counts.items()
        if count or kind == "tokens"
    }


def _write_down(
    cache: KVCache, tensors: Mapping[str, torch.Tensor], state: Fingerprint, model: PreTrainedModel
) -> None:
    """Writes down the tokens, and what computed them."""
    record, ids, hidden = cache.record, tensors.get("ids"), tensors.get("padding")
    record.state = state
    if ids is None:
        record.is_known = False
        return
    device = device_of(model) or torch.device("cpu")
    record.append(ids.to(device), ids.shape[1], None if hidden is None else (~hidden).long().to(device))


def _fingerprint_of(base: PreTrainedModel) -> Fingerprint:
    return fingerprint_of(base, "hfkv" in vars(base) and base.hfkv.exact_rotary)


def _base_of(model: Any) -> PreTrainedModel:
    base = base_model(model)
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"a cache is saved and loaded with a transformers model or a PeftModel, got {type(model).__name__}"
        )
    return base


def _file_name(path: str | os.PathLike[str]) -> str:
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"the path of a cache's file is a str or an os.PathLike of one, got {name!r}")
    return name
