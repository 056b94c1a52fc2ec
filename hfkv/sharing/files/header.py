"""`FileHeader`: what the file of a cache says besides its tensors, as JSON that is checked when it is read."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from hfkv.cache.snapshot import PartShape
from hfkv.policy.codec_pair import CODEC_WORDS, sides_of
from hfkv.policy.config import KVConfig
from hfkv.policy.recent import Recent
from hfkv.policy.rules import RULES
from hfkv.policy.window import Window

FORMAT, VERSION = "hfkv", 1
# No number of tokens, rows, heads or planes is larger.
_MOST = 1 << 40
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_DTYPES["float64"] = torch.float64
_FINGERPRINT = {"model", "adapters", "weights", "precision"}


class NotRegisteredError(ValueError):
    """The file names a codec or a rule that is not known here; the file itself is whole."""


@dataclass(frozen=True)
class LeafHeader:
    """The header of one `KVLayer`; see `Contents`."""

    key: PartShape
    value: PartShape
    seen: int
    gone_below: int
    pads: tuple[int, ...]
    origins: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        origins = {} if self.origins is None else {"origins": list(self.origins)}
        return {
            "key": _part_to_json(self.key),
            "value": _part_to_json(self.value),
            "seen": self.seen,
            "gone_below": self.gone_below,
            "pads": list(self.pads),
            **origins,
        }

    @classmethod
    def from_json(cls, value: Any) -> LeafHeader:
        """Reads a header from JSON values. Raises ValueError where they are none."""
        names = {"key", "value", "seen", "gone_below", "pads"}
        has_origins = isinstance(value, dict) and "origins" in value
        given = _object(value, "a layer", names | {"origins"} if has_origins else names)
        seen = _count(given["seen"], "the tokens seen", 1)
        gone_below = _count(given["gone_below"], "gone_below", most=seen)
        pads = tuple(_count(pad, "the pad tokens of a row", most=seen) for pad in _list(given["pads"], "pads"))
        if not pads:
            raise ValueError("a layer holds no rows")
        origins = None
        if has_origins:
            origins = tuple(_offset(origin) for origin in _list(given["origins"], "origins"))
            if len(origins) != len(pads):
                raise ValueError(f"it has {len(origins)} origins and {len(pads)} rows")
        return cls(_part_from_json(given["key"]), _part_from_json(given["value"]), seen, gone_below, pads, origins)


@dataclass(frozen=True)
class FileHeader:
    """The header of a cache.

    Attributes:
        kv: the cache's policies.
        model_type, num_layers: type and layers of the model it was built for.
        leaves: the headers of its `KVLayer`s, also inside split layers; None for a pipeline's other stages.
        fingerprint: the fingerprint of the model that filled it; see `Fingerprint.fingerprint`.
    """

    kv: KVConfig
    model_type: str
    num_layers: int
    leaves: tuple[LeafHeader | None, ...]
    fingerprint: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The header as JSON values.

        Raises:
            ValueError: a window has a schedule of one's own, or keys or values are of a dtype no file holds.
        """
        return {
            "format": FORMAT,
            "version": VERSION,
            "kv": kv_to_json(self.kv),
            "model_type": self.model_type,
            "num_layers": self.num_layers,
            "leaves": [None if leaf is None else leaf.to_json() for leaf in self.leaves],
            "fingerprint": dict(self.fingerprint),
        }

    @classmethod
    def from_json(cls, value: Any) -> FileHeader:
        """Reads a header from JSON values. Raises ValueError where they are none; see `read_json` for the version."""
        names = {"format", "version", "kv", "model_type", "num_layers", "leaves", "fingerprint"}
        given = _object(value, "the header", names)
        fingerprint = _object(given["fingerprint"], "the fingerprint", _FINGERPRINT)
        return cls(
            kv_from_json(given["kv"]),
            _text(given["model_type"], "model_type"),
            _count(given["num_layers"], "num_layers", 1),
            tuple(None if leaf is None else LeafHeader.from_json(leaf) for leaf in _list(given["leaves"], "leaves")),
            {name: _text(words, f"the fingerprint's {name}") for name, words in fingerprint.items()},
        )


def canonical(value: Any) -> str:
    """Writes a JSON value in the one way that digests are made of: ASCII, sorted, without spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def read_json(text: str) -> dict[str, Any]:
    """Reads the text of a file: of this format and of some version, otherwise unchecked.

    Raises:
        ValueError: it is not of this format, or its version is no version.
    """
    try:
        given = json.loads(text)
        canonical(given)
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"its metadata is no JSON ({type(error).__name__})") from error
    if not isinstance(given, dict) or given.get("format") != FORMAT:
        raise ValueError(f"its metadata is not of format {FORMAT!r}")
    _count(given.get("version"), "the version of its format", 1)
    return given


def kv_to_json(kv: KVConfig) -> dict[str, Any]:
    """Writes a config as JSON values, except reuse, which no cache has.

    Raises:
        ValueError: a window has a schedule of one's own.
    """
    optional: dict[str, Any] = {} if kv.device_budget is None else {"device_budget": kv.device_budget}
    optional |= {} if kv.key_mean else {"key_mean": False}
    optional |= {} if kv.recent is None else {"recent": asdict(kv.recent)}
    return {
        "codec": kv.codec,
        "window": _window_to_json(kv.window) if isinstance(kv.window, Window) else None,
        "store": kv.store,
        "page_size": kv.page_size,
        "offload": kv.offload,
        **optional,
        "layers": {indices: kv_to_json(override) for indices, override in kv.layers.items()},
    }


def kv_from_json(value: Any, is_override: bool = False) -> KVConfig:
    """Reads what `kv_to_json` wrote.

    Raises:
        ValueError: it is no config; a `NotRegisteredError` where its codec or its window's rule is not known here.
    """
    names = {"codec", "window", "store", "page_size", "offload", "layers"}
    if isinstance(value, dict):
        names |= {"device_budget", "key_mean", "recent"} & value.keys()
    given = dict(_object(value, "the config", names))
    layers = _object(given["layers"], "the config's layers", set() if is_override else None)
    for codec in _codecs_in(given["codec"]):
        _check_registered("codec", codec, CODEC_WORDS, "hfkv.codecs.register_codec")
    if isinstance(given["window"], dict):
        _check_registered("rule", given["window"].get("schedule"), RULES, "hfkv.policy.rules.register_rule")
    try:
        given["layers"] = {indices: kv_from_json(override, True) for indices, override in layers.items()}
        given["window"] = None if given["window"] is None else _window_from_json(given["window"])
        if "recent" in given:
            given["recent"] = _recent_from_json(given["recent"])
        return KVConfig(**given)
    except NotRegisteredError:
        raise
    except (TypeError, ValueError) as error:
        raise ValueError(f"its config is none: {error}") from error


def _codecs_in(codec: Any) -> tuple[Any, ...]:
    try:
        return sides_of(codec) if isinstance(codec, str) else (codec,)
    except ValueError as error:
        raise ValueError(f"its config is none: {error}") from error


def _check_registered(what: str, name: Any, known: Collection[str], register: str) -> None:
    if isinstance(name, str) and name not in known:
        raise NotRegisteredError(
            f"it was written with the {what} {_short(name)}, which is not registered here; register it first "
            f"({register}), or update hfkv; there are {', '.join(known)}"
        )


def _window_to_json(window: Window) -> dict[str, Any]:
    if callable(window.schedule):
        raise ValueError(
            "Window.schedule is a callable of your own, which no file can hold; save caches whose windows have a fixed "
            'size or a rule by name (schedule="dynamic")'
        )
    heads = [[layer, list(of_layer)] for layer, of_layer in window.global_heads.items()]
    values = {item.name: getattr(window, item.name) for item in fields(Window)}
    return {**values, "global_layers": list(window.global_layers), "global_heads": heads}


def _window_from_json(value: Any) -> Window:
    given = dict(_object(value, "the window", {item.name for item in fields(Window)}))
    heads = {}
    for pair in _list(given["global_heads"], "global_heads"):
        layer, of_layer = _list(pair, "a layer and its heads", 2)
        heads[_count(layer, "a layer")] = tuple(_list(of_layer, "its heads"))
    return Window(**{**given, "global_heads": heads, "global_layers": _list(given["global_layers"], "global_layers")})


def _recent_from_json(value: Any) -> Recent:
    given = _object(value, "the recent tokens", {item.name for item in fields(Recent)})
    for codec in _codecs_in(given["codec"]):
        _check_registered("codec", codec, CODEC_WORDS, "hfkv.codecs.register_codec")
    return Recent(**given)


def _part_to_json(part: PartShape) -> dict[str, Any]:
    dtype = str(part.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ValueError(f"keys and values of {dtype} cannot be saved, only those of {', '.join(_DTYPES)}")
    planes = [part.planes.start, part.planes.stop]
    return {"planes": planes, "heads": part.heads, "head_dim": part.head_dim, "dtype": dtype}


def _part_from_json(value: Any) -> PartShape:
    given = _object(value, "keys or values", {"planes", "heads", "head_dim", "dtype"})
    first, last = _list(given["planes"], "planes", 2)
    planes = slice(_count(first, "the first plane"), None if last is None else _count(last, "the last plane"))
    dtype = _text(given["dtype"], "dtype")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {_short(dtype)}")
    heads = _count(given["heads"], "heads", 1)
    return PartShape(planes, heads, _count(given["head_dim"], "head_dim", 1, most=1 << 20), _DTYPES[dtype])


def _object(value: Any, what: str, names: set[str] | None) -> dict[str, Any]:
    if not isinstance(value, dict) or (names is not None and value.keys() != names):
        raise ValueError(f"{what} must be an object{f' of {sorted(names)}' if names else ''}, got {_short(value)}")
    return value


def _list(value: Any, what: str, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise ValueError(f"{what} must be a list{f' of {length}' if length else ''}, got {_short(value)}")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a string, got {_short(value)}")
    return value


def _offset(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > _MOST:
        raise ValueError(f"the origin of a row is no whole number: {_short(value)}")
    return value


def _count(value: Any, what: str, least: int = 0, most: int = _MOST) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{what} must be a whole number from {least} to {most}, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    """What a file gave, in few enough words for an error."""
    words = ascii(value)
    return words if len(words) <= 60 else f"{words[:60]}..."
