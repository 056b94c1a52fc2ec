"""`KVConfig`: what to keep of a KV cache and how, as a frozen value and as a string."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from hfkv.policy.codec_pair import checked_codec
from hfkv.policy.layer_range import layer_range
from hfkv.policy.ports import port
from hfkv.policy.promise import check_share
from hfkv.policy.recent import Recent, check_recent
from hfkv.policy.reuse import Reuse
from hfkv.policy.units import read_bytes, shortened
from hfkv.policy.window import Window
from hfkv.policy.words import STORES, read_words, words_of

_MOST_PAGE = 1 << 40


@dataclass(frozen=True)
class KVConfig:
    """Three policies that compose: how numbers are written, which tokens stay, where the bytes live.

    Args:
        codec: ``"none"`` (the model's own dtype, exact), ``"int8"``, ``"int4"``, ``"fp8"``, ``"int3"`` or
            ``"int2"``; or one for keys and one for values: ``"k:int8+v:int4"``.
        window: None keeps every token; an int is ``Window(size=...)``.
        store: ``"contiguous"`` (one growing buffer a layer), ``"paged"`` (pages with reference counts, shared
            by beams) or ``"auto"`` (contiguous).
        page_size: tokens a page, a power of two; None takes 256 on a CPU and 64 on an accelerator. Only
            with ``store="paged"``.
        offload: keep the bytes in host memory and bring them to the device a stretch at a time. Where the host's
            memory is the device's (a CPU), nothing moves.
        device_budget: with ``offload``, the most bytes of keys and values of all layers to keep on the device: a
            number, or ``"8GiB"``. None keeps only the newest page of each row there.
        reuse: None, or a `Reuse`: the calls of a patched model share prompt prefixes.
        layers: overrides for single layers, by index or range: ``{"0-1": KVConfig(codec="none")}``.
        loss_change: None, or a promise: the share by which the model's loss may change against the full cache, 0.005
            say. `hfkv.patch` then finds the codec of each layer by measuring, as `for_fidelity` does.
        key_mean: whether a patched model's keys are written less their mean where a codec has less than 8 bits.
        recent: None, or a `Recent`: the newest tokens and the first ones of each row in more bits than `codec` has.

    Raises:
        TypeError, ValueError: naming the field, what was given and what is allowed.
    """

    codec: str = "none"
    window: Window | int | None = None
    store: str = "auto"
    page_size: int | None = None
    offload: bool = False
    device_budget: int | str | None = None
    reuse: Reuse | None = None
    layers: Mapping[str, KVConfig] = field(default_factory=dict)
    loss_change: float | None = None
    key_mean: bool = True
    recent: Recent | None = None

    def __post_init__(self) -> None:
        if isinstance(self.window, int) and not isinstance(self.window, bool):
            object.__setattr__(self, "window", Window(self.window))
        object.__setattr__(self, "codec", checked_codec("KVConfig.codec", self.codec))
        _check_choice("store", self.store, STORES)
        if self.window is not None and not isinstance(self.window, Window):
            raise TypeError(f"KVConfig.window must be None, an int or an hfkv.Window, got {self.window!r}")
        for name in ("offload", "key_mean"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"KVConfig.{name} must be True or False, got {getattr(self, name)!r}")
        if self.device_budget is not None:
            object.__setattr__(self, "device_budget", read_bytes("KVConfig.device_budget", self.device_budget))
            if not self.offload:
                raise ValueError("KVConfig.device_budget needs offload=True: without it every byte is on the device")
        if self.reuse is not None and not isinstance(self.reuse, Reuse):
            raise TypeError(
                f'KVConfig.reuse must be None or an hfkv.Reuse, such as hfkv.Reuse(budget="4GiB"); got {self.reuse!r}'
            )
        self._check_page_size()
        self._check_layers()
        self._check_loss_change()
        check_recent(self.recent, self.codec, self.window is not None, self.loss_change is not None)

    def _check_page_size(self) -> None:
        if self.page_size is None:
            return
        if not isinstance(self.page_size, int) or isinstance(self.page_size, bool):
            raise TypeError(f"KVConfig.page_size must be None or an int (tokens), got {self.page_size!r}")
        if self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise ValueError(f"KVConfig.page_size must be a power of two, got {self.page_size}")
        if self.page_size > _MOST_PAGE:
            raise ValueError(
                f"KVConfig.page_size must be at most {_MOST_PAGE:,} tokens, got {shortened(self.page_size)}"
            )
        if self.store != "paged":
            raise ValueError(f'KVConfig.page_size needs store="paged", got store={self.store!r}')

    def _check_layers(self) -> None:
        if not isinstance(self.layers, Mapping):
            raise TypeError(f'KVConfig.layers must map "0-1" or "3" to a KVConfig, got {self.layers!r}')
        seen: list[range] = []
        for key, override in self.layers.items():
            indices = layer_range(key)
            if not isinstance(override, KVConfig):
                raise TypeError(f"KVConfig.layers[{key!r}] must be a KVConfig, got {override!r}")
            if override.layers:
                raise ValueError(f"KVConfig.layers[{key!r}] must not itself have layers")
            if override.device_budget is not None:
                raise ValueError(
                    f"KVConfig.layers[{key!r}] must not have a device_budget: it is for all layers together"
                )
            if override.reuse is not None:
                raise ValueError(f"KVConfig.layers[{key!r}] must not have reuse: a prefix is shared in all layers")
            if isinstance(override.window, Window) and (override.window.global_layers or override.window.global_heads):
                raise ValueError(
                    f"KVConfig.layers[{key!r}] must not name global layers or heads; name them in KVConfig.window"
                )
            for other in seen:
                if indices.start < other.stop and other.start < indices.stop:
                    raise ValueError(f"KVConfig.layers names layer {max(indices.start, other.start)} twice")
            if override.loss_change is not None:
                raise ValueError(f"KVConfig.layers[{key!r}] must not have a loss_change: it is for all layers together")
            seen.append(indices)
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    def _check_loss_change(self) -> None:
        if self.loss_change is None:
            return
        object.__setattr__(self, "loss_change", check_share("KVConfig.loss_change", self.loss_change))
        if self.codec != "none" or self.layers:
            raise ValueError(
                "KVConfig.loss_change finds the codec of every layer by itself: leave codec and layers out, or "
                f"loss_change; got codec={self.codec!r} and {len(self.layers)} layers"
            )

    def _but_layers(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The values of the fields before `layers`, and of those behind it."""
        before = (self.codec, self.window, self.store, self.page_size, self.offload, self.device_budget, self.reuse)
        return before, (self.loss_change, self.key_mean, self.recent)

    def __hash__(self) -> int:
        return hash((self._but_layers(), tuple(sorted(self.layers.items(), key=lambda item: item[0]))))

    def __reduce__(self) -> tuple:
        # A mapping proxy can be neither copied nor pickled.
        before, behind = self._but_layers()
        return (KVConfig, (*before, dict(self.layers), *behind))

    def for_layer(self, layer_idx: int) -> KVConfig:
        """The config of one layer: the override that names it, or this one without overrides."""
        for key, override in self.layers.items():
            if layer_idx in layer_range(key):
                return override
        return replace(self, layers={}, device_budget=None, reuse=None)

    def names_layer(self, layer_idx: int) -> bool:
        """Whether `layers` has an override for this layer."""
        return any(layer_idx in layer_range(key) for key in self.layers)

    def first_layers(self, count: int) -> KVConfig:
        """This config for a model of which only the first `count` layers run."""
        named = {key: layer_range(key) for key in self.layers}
        kept = {f"{r.start}-{min(r.stop, count) - 1}": self.layers[key] for key, r in named.items() if r.start < count}
        window = self.window.first_layers(count) if isinstance(self.window, Window) else None
        return replace(self, layers=kept, window=window)

    @property
    def last_named_layer(self) -> int:
        """The highest layer index `layers` names, or -1."""
        return max((layer_range(key)[-1] for key in self.layers), default=-1)

    @property
    def needs_rotary(self) -> bool:
        """Whether a window needs to know how the model rotates its keys."""
        configs = (self, *self.layers.values())
        return any(isinstance(config.window, Window) and config.window.needs_rotary for config in configs)

    @property
    def needs_own_attention(self) -> bool:
        """Whether only the ``"hfkv"`` attention can read such a cache: under a window, or with recent tokens apart."""
        configs = (self, *self.layers.values())
        return any(config.window is not None or config.recent is not None for config in configs)

    @property
    def is_lossless(self) -> bool:
        """Whether attention sees exactly the keys and values the model computed."""
        own = self.codec == "none" and self.window is None and self.loss_change is None
        return own and all(override.is_lossless for override in self.layers.values())

    @classmethod
    def parse(cls, text: str) -> KVConfig:
        """Reads ``"int8+window:4096+sinks:4+offload+paged+reuse"``; words in any order, each at most once.

        Args:
            text: words joined by ``+``: a codec (none, int8, int4, fp8, int3, int2), one for keys and one for
                values (``k:int8+v:int4``) or ``auto:0.5%``, ``key_mean:off``, ``recent:SIZE`` or
                ``recent:SIZE:CODEC`` and with it ``recent_sinks:COUNT``, ``contiguous`` or ``paged``,
                ``page_size:TOKENS``, ``offload``, ``device_budget:8GiB``, ``reuse`` or ``reuse:2GiB``, and
                ``window:SIZE`` or ``window:dynamic``, which the fields of `Window` may follow: ``sinks:COUNT``,
                ``sink_positions:cache``, ``size:SIZE`` (the most a dynamic window shows), ``global_layers:0.5``
                (layers 0 and 5), ``global_heads:2=0.1,5=3`` (heads 0 and 1 of layer 2, head 3 of layer 5),
                ``summary:mean``, ``summary_pages:COUNT``, ``summary_page_size:TOKENS``.

        Raises:
            ValueError: naming the word and what is allowed.
        """
        if not isinstance(text, str):
            raise TypeError(f"KVConfig.parse takes a str, got {type(text).__name__}")
        return cls(**read_words(text))

    @classmethod
    def of(cls, kv: KVConfig | str | None) -> KVConfig:
        """A config from what callers give: a KVConfig, its string form, or None for the default."""
        if kv is None:
            return cls()
        if isinstance(kv, str):
            return cls.parse(kv)
        if isinstance(kv, KVConfig):
            return kv
        field = {Window: "window", Reuse: "reuse", Recent: "recent"}.get(type(kv))
        hint = f"; write KVConfig({field}=...) around it" if field else ""
        raise TypeError(f'kv must be a KVConfig, a string such as "int8+window:4096", or None, got {kv!r}{hint}')

    @classmethod
    def for_budget(
        cls, model: Any, budget: int | str, context: int | str, batch: int = 1, *, offload: bool = False
    ) -> KVConfig:
        """The least lossy config whose keys and values fit in a budget: none, int8, fp8 or int4, in this order.

        Args:
            model: a model, a config, the name of a shape (``"llama-8b"``), a folder, or a name on the Hub. Only its
                config is read.
            budget: bytes for keys and values alone, a number or ``"8GiB"``.
            context: tokens of each row, prompt and reply together: a number, or ``"128k"``.
            batch: rows; beams count.
            offload: where ``"none"`` does not fit, keep the budget on the device and the rest in host memory
                instead: lossless, and slower. The staging buffers, 96 MiB at most, come on top. Refused on a CPU, and
                with a budget below one page of every layer.

        Raises:
            TypeError, ValueError: nothing fits, naming what the smallest needs and the longest context that fits; or an
                argument is not what it should be.
        """
        return port("least_lossy")(model, budget, context, batch, offload=offload)

    @classmethod
    def for_fidelity(
        cls,
        model: Any,
        calibration: Any = None,
        loss_change: float = 0.005,
        *,
        kv: KVConfig | str | None = None,
        memory: int | str | None = None,
        context: int | str | None = None,
        batch: int = 1,
        tokens: int = 4096,
    ) -> KVConfig:
        """The config of fewest bytes whose codecs, layer by layer, change the loss no more than promised.

        The model reads a text under the full cache and under others, for each layer and each codec, and then under
        combinations; see `hfkv.eval.find_codecs`, which says what was measured too. One text gives one config.

        Args:
            model: a causal language model or a `PeftModel` around one, loaded and not patched.
            calibration: what it reads: token ids `[T]` without BOS, or a str, for which the tokenizer is loaded from
                where the model was. None takes Python source that comes with hfkv; a text like those that the model
                will read keeps the promise better.
            loss_change: the share of the loss by which the loss, and the KL divergence of the forecasts from the full
                cache's, may be larger on this text.
            kv: what else the config says, such as ``"window:4096+paged"``: no codec. A window's own cost counts.
            memory: bytes for keys and values, a number or ``"8GiB"``: then the first config that fits is taken, which
                loses less than the promise allows. Needs `context`.
            context: tokens of each row, prompt and reply together, a number or ``"32k"``. The text is read in blocks of
                so many, at most `tokens`; None reads blocks of 1,024.
            batch: rows, for `memory`.
            tokens: tokens of the text to read, or fewer where it has fewer.

        Raises:
            TypeError, ValueError: no config keeps the promise in `memory`, naming what is reachable; there is no text
                to read; or an argument is not what it should be.
        """
        found = port("find_codecs")(
            model, calibration, loss_change, kv=kv, memory=memory, context=context, batch=batch, tokens=tokens
        )
        return found.kv

    def to_json(self) -> str:
        """This config as JSON, `layers` and a salt included, which have no word: what `from_json` reads.

        Raises:
            ValueError: a window has a schedule of one's own, which no text can hold.
        """
        return port("config_to_text")(self)

    @classmethod
    def from_json(cls, text: str) -> KVConfig:
        """Reads what `to_json` wrote.

        Raises:
            TypeError, ValueError: it is no config, or names a codec or a rule that is not registered here.
        """
        return port("config_from_text")(text)

    def __str__(self) -> str:
        return "+".join(words_of(self))


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"KVConfig.{name} must be one of {', '.join(allowed)}, got {value!r}")
