"""`ExpertSlots`: which expert each token goes to, for every linear layer of one forward."""

from __future__ import annotations

from collections.abc import Callable

import torch

# What a tiling of slots is made by: ids, E, rows a tile -> order, tiles.
Tile = Callable[[torch.Tensor, int, int], tuple[torch.Tensor, torch.Tensor]]


class ExpertSlots:
    """S = T * K slots: slot t * K + k is the k-th expert of token t.

    Ids that are no expert's (expert parallelism writes E) belong to another machine: their slots are skipped, and what
    they give is zeros. Nothing here waits for the device, and no shape depends on what ids there are, so that it can be
    captured in a graph. What is sorted is sorted when it is first asked for: the kernel for a few slots does not ask.

    Attributes:
        experts: `[S]`, the ids as they came, contiguous.
        num_experts: E.
        num_tokens: T.
        top_k: K.
        tilings: those made so far, by rows a tile.
    """

    def __init__(self, top_k_index: torch.Tensor, num_experts: int) -> None:
        self.num_tokens, self.top_k = top_k_index.shape
        self.num_experts = num_experts
        self.experts = top_k_index.reshape(-1).contiguous()
        self.tilings: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._sorted: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def num_slots(self) -> int:
        """Number of slots, S."""
        return self.num_tokens * self.top_k

    @property
    def order(self) -> torch.Tensor:
        """ExpertSlots sorted by expert, each expert's in their order, and slots of no expert last: int64 `[S]`."""
        return self._sort()[0]

    @property
    def offsets(self) -> torch.Tensor:
        """Indices in `order` at which each expert's slots begin, and the last one's end: int32 `[E + 1]`."""
        return self._sort()[1]

    def tiles(self, block_m: int, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        """The tiling of `block_m` rows, made by `tile` once: see `tile_slots`."""
        if block_m not in self.tilings:
            self.tilings[block_m] = tile(self.experts, self.num_experts, block_m)
        return self.tilings[block_m]

    def _sort(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._sorted is None:
            self._sorted = sort_slots(self.experts, self.num_experts)
        return self._sorted


def sort_slots(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`ExpertSlots.order` and `ExpertSlots.offsets` of ids `[S]`."""
    is_expert = (experts >= 0) & (experts < num_experts)
    ids, order = torch.where(is_expert, experts, num_experts).sort(stable=True)
    offsets = torch.searchsorted(ids, torch.arange(num_experts + 1, device=ids.device), out_int32=True)
    return order, offsets


def num_tiles(num_slots: int, num_experts: int, block_m: int) -> int:
    """Places for tiles: what any choice of experts needs, and one for slots of no expert."""
    return num_slots // block_m + num_experts + 1


def tile_slots(experts: torch.Tensor, num_experts: int, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cuts the sorted slots into tiles of one expert each.

    The tiles of expert e begin at place `begin // block_m + e`: as begins and e both grow, no two experts meet, and no
    expert has to know how many tiles another has. A place in between may be left over.

    Args:
        experts: `[S]` ids.
        num_experts: E.
        block_m: rows a tile has at most.

    Returns:
        The slots in the order of `ExpertSlots.order`, int32 `[S]`, and for each place the expert (E for none, -1 for no
        tile), and where in the order its slots begin and end, int32 `[num_tiles, 3]`.
    """
    order, offsets = sort_slots(experts, num_experts)
    num_slots = len(experts)
    begins = offsets.long()
    ends = torch.cat((begins[1:], begins.new_full((1,), num_slots)))
    places = torch.arange(num_tiles(num_slots, num_experts, block_m), device=experts.device)
    first_places = begins // block_m + torch.arange(num_experts + 1, device=experts.device)
    expert = torch.searchsorted(first_places, places, right=True) - 1
    low = begins[expert] + (places - first_places[expert]) * block_m
    is_tile = low < ends[expert]
    tiles = torch.stack((expert, low, torch.minimum(low + block_m, ends[expert])), dim=1)
    return order.int(), torch.where(is_tile[:, None], tiles, -1).int()
