"""`Changes`: what paged stores in the same state have done last, so that the next ones need not work it out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from hfkv.stores.block_table import BlockTable
from hfkv.stores.blocks import BlockPool

# A forward takes a drop, a copy and new columns at most; forks of a cache take turns.
_RECENT = 8


class Change(NamedTuple):
    """What came of a request to a store.

    Attributes:
        asked: the request, and everything else of the store that decides what comes of it.
        table, blocks: block table and counts of pages before.
        table_after, blocks_after: the same afterwards.
        moves: what was done to the planes: functions of a store, and their other arguments.
    """

    asked: tuple[Any, ...]
    table: BlockTable
    blocks: BlockPool
    table_after: BlockTable
    blocks_after: BlockPool
    moves: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...]


class Changes:
    """The latest changes of stores that do the same in turn: those of the layers of a group.

    Tables and counts are never changed once they are here. A store that is in another state than the one before it
    finds nothing, works out what to do by itself, and nothing is wrong.
    """

    def __init__(self) -> None:
        self._recent: deque[Change] = deque(maxlen=_RECENT)

    def __reduce__(self) -> Any:
        return Changes, ()

    def find(self, asked: tuple[Any, ...], table: BlockTable, blocks: BlockPool) -> Change | None:
        """The change of a store that was in this state, or None."""
        for change in tuple(self._recent):
            if change.asked == asked and change.table == table and change.blocks == blocks:
                return change
        return None

    def add(self, change: Change) -> None:
        """Keeps a change, and forgets the oldest."""
        self._recent.append(change)
