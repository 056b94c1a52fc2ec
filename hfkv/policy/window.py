"""`Window`: the tokens that stay under a sliding window with attention sinks; integers only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from hfkv.policy.rules import RULES
from hfkv.policy.schedule import Schedule

SINK_POSITIONS = ("absolute", "cache")
_MOST = 1 << 40  # tokens


@dataclass(frozen=True)
class Window:
    """A query at position t attends to key j when ``j <= t and (j > t - size or j < sinks)``.

    Positions count from a row's first real token: left padding takes neither sinks nor window. The first tokens
    ("attention sinks") keep a model stable when the middle of the text is gone (Xiao et al., "Efficient Streaming
    Language Models with Attention Sinks", arXiv 2309.17453).

    Args:
        size: how many of the newest tokens a query sees, itself included; at least 1. It limits what a
            `schedule` says, and may be None under a named one.
        sinks: how many of the first tokens stay for good; at least 0.
        sink_positions: the distance a query sees to the sinks. ``"absolute"``: the true one, which grows with the
            text. ``"cache"``: as if the tokens between them and the window had never been, so no distance
            exceeds ``sinks + size`` (needs a model with rotary positions).
        schedule: None; the name of a rule (`hfkv.policy.rules`), such as ``"dynamic"``: everything below 1,024 tokens
            seen, 2,048 below 8,192, then 4,096; or a callable from the number of tokens seen to a size. What a window
            has let go of stays gone when it grows.
        global_layers: layers that keep everything.
        global_heads: kv heads that keep everything, by layer, while the others of the layer slide.
        summary: None, or ``"mean"``: of each page of tokens that leaves the window one key and value stay, the
            mean over the page, keys turned to the position of the page's middle first (needs a model with rotary
            positions). Pages count from the first real token; sinks are not part of the mean.
        summary_pages: how many summaries a query sees, the newest; at least 1.
        summary_page_size: tokens a page.

    Raises:
        TypeError: a field is of the wrong type.
        ValueError: a field is out of range.
    """

    size: int | None = None
    sinks: int = 4
    sink_positions: str = "absolute"
    schedule: str | Callable[[int], int] | None = None
    global_layers: tuple[int, ...] = ()
    global_heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    summary: str | None = None
    summary_pages: int = 16
    summary_page_size: int = 64

    def __post_init__(self) -> None:
        if callable(self.schedule) and self.size is None:
            raise TypeError("Window.size must say the most that a schedule of your own returns, got None")
        if self.schedule is None or self.size is not None:
            _check_int("size", self.size, 1)
        _check_int("sinks", self.sinks, 0)
        _check_int("summary_pages", self.summary_pages, 1, "page")
        _check_int("summary_page_size", self.summary_page_size, 1)
        if self.sink_positions not in SINK_POSITIONS:
            raise ValueError(f'Window.sink_positions must be "absolute" or "cache", got {self.sink_positions!r}')
        if self.summary not in (None, "mean"):
            raise ValueError(f'Window.summary must be None or "mean", got {self.summary!r}')
        defaults = (Window.summary_pages, Window.summary_page_size)
        if self.summary is None and (self.summary_pages, self.summary_page_size) != defaults:
            raise ValueError('Window.summary_pages and summary_page_size go with summary="mean"')
        if not (self.schedule is None or self.schedule in tuple(RULES) or callable(self.schedule)):
            names = ", ".join(f'"{name}"' for name in RULES)
            raise ValueError(
                f"Window.schedule must be None, {names} or a callable from tokens seen to a size, got {self.schedule!r}"
            )
        object.__setattr__(self, "global_layers", _indices("global_layers", self.global_layers))
        if not isinstance(self.global_heads, Mapping):
            raise TypeError(f"Window.global_heads must map layers to kv heads, got {self.global_heads!r}")
        _indices("global_heads", self.global_heads)  # before they are sorted
        heads = {
            _indices("global_heads", [layer])[0]: _indices(f"global_heads[{layer}]", given)
            for layer, given in sorted(self.global_heads.items())
        }
        for layer in heads:
            if layer in self.global_layers:
                raise ValueError(f"Window.global_heads names layer {layer}, which global_layers keeps whole")
            if not heads[layer]:
                raise ValueError(f"Window.global_heads[{layer}] names no head; leave the layer out")
        object.__setattr__(self, "global_heads", MappingProxyType(heads))
        object.__setattr__(self, "_schedule", Schedule(self.size, self.schedule))

    def _values(self) -> tuple:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return tuple({**values, "global_heads": dict(self.global_heads)}.values())

    def __hash__(self) -> int:
        return hash((self.size, self.sinks, self.sink_positions, self.global_layers, self.summary))

    def __reduce__(self) -> tuple:
        # A mapping proxy can be neither copied nor pickled.
        return (Window, self._values())

    def first_layers(self, count: int) -> Window:
        """This window for a model of which only the first `count` layers run."""
        heads = {layer: heads for layer, heads in self.global_heads.items() if layer < count}
        return replace(self, global_layers=tuple(i for i in self.global_layers if i < count), global_heads=heads)

    @property
    def needs_rotary(self) -> bool:
        """Whether queries or keys are turned to other positions, so that the model's rotation must be known."""
        return self.sink_positions == "cache" or self.summary is not None

    @property
    def sizes(self) -> Schedule:
        """The size at any number of tokens seen."""
        return self._schedule  # type: ignore[attr-defined]

    @property
    def num_slots(self) -> int:
        """How many tokens are kept apart from the newest ones: sinks, then summaries."""
        return self.sinks + (self.summary_pages if self.summary else 0)

    @property
    def reach(self) -> int:
        """How many tokens below the lower bound stay: a page may wait to be summarised."""
        return self.summary_page_size if self.summary else 0

    def held_from(self, gone_below: int) -> int:
        """The oldest position held, apart from the slots, when no later query sees a token below `gone_below`."""
        return max(gone_below - self.reach, 0)

    def lower_bound(self, t: int) -> int:
        """L(t): the lowest position above the sinks that a query at position `t` attends to."""
        return self.sizes.lower_bound(t)

    def capacity(self) -> int:
        """How many tokens are held at most between two steps of one token."""
        return self.num_slots + self.reach + self.sizes.capacity()


def _check_int(name: str, value: object, least: int, unit: str = "token") -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Window.{name} must be an int (a number of {unit}s), got {value!r}")
    if value > _MOST:
        raise ValueError(f"Window.{name} must be at most {_MOST:,}, got {value:,}; leave the window out")
    if value < least:
        raise ValueError(f"Window.{name} must be at least {least} {unit}{'s' * (least != 1)}, got {value}")


def _indices(name: str, given: Iterable[int]) -> tuple[int, ...]:
    try:
        indices: tuple[Any, ...] = tuple(given)
    except TypeError:
        raise TypeError(f"Window.{name} must be a sequence of indices, got {given!r}") from None
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in indices):
        raise TypeError(f"Window.{name} must be ints, got {given!r}")
    if any(index < 0 for index in indices) or len(set(indices)) < len(indices):
        raise ValueError(f"Window.{name} must be different indices of at least 0, got {given!r}")
    return tuple(sorted(indices))
