"""`Eviction`: which expert leaves a full layer's slots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection


class Eviction(ABC):
    """A policy for one layer, told of every use: a forward uses each expert once, however many tokens choose it."""

    def touch(self, expert: int) -> None:  # noqa: B027  (a policy may not care)
        """Notes that a forward uses `expert`, which is in a slot."""

    def admit(self, expert: int) -> None:  # noqa: B027  (a policy may not care)
        """Notes that a forward uses `expert`, which has just come into a slot."""

    @abstractmethod
    def victim(self, resident: Collection[int], needed: Collection[int]) -> int:
        """Chooses the expert that leaves.

        Args:
            resident: the experts in slots.
            needed: the experts that may not leave now; some of `resident` are not among them.

        Returns:
            One of `resident` that is not among `needed`.
        """


class LRU(Eviction):
    """Evicts the expert that was last used longest ago."""

    def __init__(self) -> None:
        self._time = 0
        self._used: dict[int, int] = {}

    def touch(self, expert: int) -> None:
        self._time += 1
        self._used[expert] = self._time

    admit = touch

    def victim(self, resident: Collection[int], needed: Collection[int]) -> int:
        return min((expert for expert in resident if expert not in needed), key=self._used.__getitem__)


class LFU(Eviction):
    """Evicts the expert that was used least often; among equals the one that was last used longest ago.

    Uses are counted from the beginning, not from when an expert last came in: a router prefers the same experts all
        along.
    """

    def __init__(self) -> None:
        self._time = 0
        self._used: dict[int, tuple[int, int]] = {}  # how often, and when last

    def touch(self, expert: int) -> None:
        self._time += 1
        self._used[expert] = self._used.get(expert, (0, 0))[0] + 1, self._time

    admit = touch

    def victim(self, resident: Collection[int], needed: Collection[int]) -> int:
        return min((expert for expert in resident if expert not in needed), key=self._used.__getitem__)


class FIFO(Eviction):
    """Evicts the expert that came in first."""

    def __init__(self) -> None:
        self._time = 0
        self._came: dict[int, int] = {}

    def admit(self, expert: int) -> None:
        self._time += 1
        self._came[expert] = self._time

    def victim(self, resident: Collection[int], needed: Collection[int]) -> int:
        return min((expert for expert in resident if expert not in needed), key=self._came.__getitem__)


EVICTIONS: dict[str, type[Eviction]] = {"lru": LRU, "lfu": LFU, "fifo": FIFO}


def check_eviction(name: str, given: str | Callable[[], Eviction]) -> None:
    """Raises where `given` names no policy and makes none.

    Args:
        name: the field's name, for the error.
        given: a name, or a callable without arguments that makes each layer's own policy: a class, say.

    Raises:
        TypeError, ValueError: saying what was given and what is allowed.
    """
    if isinstance(given, str):
        if given not in EVICTIONS:
            raise ValueError(
                f"{name} must be one of {', '.join(EVICTIONS)}, or a subclass of hfkv.experts.offload.Eviction, "
                f"got {given!r}"
            )
    elif isinstance(given, Eviction):
        raise TypeError(f"{name} takes a class and not an object of it: each layer has its own; got {given!r}")
    elif not callable(given) or (isinstance(given, type) and not issubclass(given, Eviction)):
        raise TypeError(
            f"{name} must be one of {', '.join(EVICTIONS)}, a subclass of hfkv.experts.offload.Eviction, or a "
            f"function without arguments that makes one, got {given!r}"
        )


def make_eviction(given: str | Callable[[], Eviction]) -> Eviction:
    """Makes a policy for one layer, by name or by calling what makes one; see `check_eviction`."""
    check_eviction("eviction", given)
    policy = EVICTIONS[given]() if isinstance(given, str) else given()
    if not isinstance(policy, Eviction):
        raise TypeError(f"eviction made {policy!r}, which is no hfkv.experts.offload.eviction.Eviction")
    return policy


def eviction_name(given: str | Callable[[], Eviction]) -> str:
    """The name of a policy."""
    return given if isinstance(given, str) else getattr(given, "__name__", type(given).__name__)
