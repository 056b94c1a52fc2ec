"""`Call`: what the attention operators take besides queries and planes, checked before them and launched by them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from hfkv.kernels.device_inputs import NUM_COUNTERS, NUM_SCALARS, DeviceInputs, device_inputs, is_ragged
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.triton.arguments import TL_DTYPES
from hfkv.kernels.triton.merge import FEW_SPLITS, LOADED, MAX_SPLITS, merge
from hfkv.kernels.triton.numbers import rotation
from hfkv.kernels.triton.support import unsupported_scoring
from hfkv.kernels.triton.tiling import MAX_REGISTERS, Tiling, choose_splits, device_of
from hfkv.stores.layout import Layout


class Call(NamedTuple):
    """Arguments that the attention operators have in common, in their order.

    Attributes:
        meta, columns, bounds, mask: fields of `DeviceInputs`.
        sink_logits, scale, softcap: fields of `Scoring`.
        capacity: tokens to choose the number of splits for.
        num_splits: splits, or 0 to choose.
        counters: of `DeviceInputs`, if the kernel can merge its splits itself; zero again when it is done.
    """

    meta: torch.Tensor
    columns: int
    bounds: torch.Tensor | None
    mask: torch.Tensor | None
    sink_logits: torch.Tensor | None
    scale: float
    softcap: float | None
    capacity: int
    num_splits: int
    counters: torch.Tensor | None

    @classmethod
    def checked(
        cls,
        query: torch.Tensor,
        parts: tuple[Encoded, Encoded],
        key_dim: int,
        layout: Layout,
        visibility: Visibility,
        scoring: Scoring,
        inputs: DeviceInputs | None,
        capacity: int | None,
        num_splits: int,
        *,
        merges: bool = True,
    ) -> Call:
        """Makes a call of arguments that belong together; see `decode_attention` for those not listed here.

        Args:
            parts: both sets of planes.
            key_dim: the dimensions that queries must have.
            num_splits: splits, or 0 to choose.
            merges: whether the kernel can merge its splits itself.

        Raises:
            ValueError: shapes that do not belong together, more splits than can be merged, or a scoring that kernels
                do not do.
        """
        reason = unsupported_scoring(scoring)
        if reason is not None:
            raise ValueError(reason)
        batch, num_heads, _, head_dim = query.shape
        data = parts[0].planes[0]
        num_kv_heads = data.shape[1]
        if num_heads % num_kv_heads or head_dim != key_dim or len(visibility.pads) != batch:
            raise ValueError(
                f"queries {tuple(query.shape)} do not go with {num_kv_heads} kv heads of {key_dim} dimensions "
                f"and {len(visibility.pads)} rows"
            )
        if not 0 <= num_splits <= MAX_SPLITS:
            raise ValueError(f"num_splits is {num_splits}, and at most {MAX_SPLITS} can be merged")
        if not all(_is_readable(plane) for plane in (*parts[0].planes, *parts[1].planes[1:])) or not _is_readable(
            parts[1].planes[0], may_be_transposed=True
        ):
            raise ValueError(
                "the numbers of a token must lie side by side in every plane, or in that of values' data the tokens"
            )
        if capacity is None:
            # An eager call is cut for what it reads; a captured one for all that it may come to read.
            capacity = layout.length - visibility.first
            if inputs is not None:
                capacity = data.shape[2] * inputs.columns if layout.is_paged else data.shape[2]
        inputs = device_inputs(layout, visibility, query.device) if inputs is None else inputs
        if inputs.batch != batch:
            raise ValueError(f"inputs for {inputs.batch} rows, with {batch} rows of queries")
        return cls(
            inputs.meta,
            inputs.columns,
            inputs.bounds,
            inputs.mask,
            scoring.sink_logits,
            scoring.scale,
            scoring.softcap,
            capacity,
            num_splits,
            inputs.counters if merges else None,
        )

    def launch(
        self,
        kernel: Any,
        query: torch.Tensor,
        planes: tuple[torch.Tensor | int | None, ...],
        constants: tuple[object, ...],
        *,
        tiles: Tiling,
        dtypes: tuple[torch.dtype, torch.dtype, str] | None,
        num_kv_heads: int,
        page_size: int,
        is_rotated: bool,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Launches an attention kernel. Its splits are merged if there are several or values are still rotated.

        Args:
            kernel: the kernel.
            query: `[B, Hq, q, D]`.
            planes: its arguments behind the query: both sets of planes.
            constants: its compile-time constants that describe the planes.
            tiles: rows and tokens of a tile, warps and stages.
            dtypes: what `product_dtypes` gives, if the kernel takes it.
            num_kv_heads: heads of the planes.
            page_size: P, or 0 for contiguous planes.
            is_rotated: whether values are stored rotated.
            out, lse: to be written to, as `outputs` makes them.
        """
        query = query if query.stride(3) == 1 else query.contiguous()
        batch, num_heads, num_queries, _ = query.shape
        rows = num_heads // num_kv_heads
        num_row_tiles = triton.cdiv(rows * num_queries, tiles.block_m)
        num_splits = self.num_splits
        num_programs = num_row_tiles * num_kv_heads * batch
        if num_splits == 0:
            num_tiles = triton.cdiv(self.capacity, tiles.block_n)
            num_splits = choose_splits(device_of(query.device), num_programs, num_tiles, tiles.num_warps)
        is_merged = num_splits > 1 or is_rotated
        # The last program of some rows merges their splits, where they are few and its registers hold the rows.
        is_last = False
        merges: tuple[object, ...] = ()
        to_merge: tuple[object, ...] = ()
        if self.counters is not None:
            width = triton.next_power_of_2(out.shape[3])
            at_once = LOADED // (tiles.block_m * width)
            is_last = is_merged and num_splits <= FEW_SPLITS and num_programs <= NUM_COUNTERS and at_once > 0
            merges = (out, lse, self.counters) if is_last else (None, None, None)
            turned = rotation(out.shape[3]) if is_rotated else (1, 0)
            to_merge = (*turned, width, min(FEW_SPLITS, at_once) if is_last else 0, FEW_SPLITS)
        parts = lse.new_empty(num_splits, *out.shape) if is_merged else out
        part_lse = lse.new_empty(num_splits, *lse.shape) if is_merged else lse
        bounds, mask = self.bounds, self.mask
        bounds_strides = (0, 0) if bounds is None else bounds.expand(batch, num_queries).stride()
        mask_strides = (0,) * 4 if mask is None else mask.expand(batch, num_heads, num_queries, -1).stride()
        factors = () if dtypes is None else (TL_DTYPES[dtypes[0]], TL_DTYPES[dtypes[1]], dtypes[2])
        kernel[(num_row_tiles * num_splits, num_kv_heads, batch)](
            *(query, *query.stride()[:3], *planes),
            *(self.meta, self.columns, bounds, *bounds_strides),
            *(None if mask is None else mask.view(torch.uint8), *mask_strides),
            *(self.sink_logits, parts, part_lse, *merges, num_queries, num_splits, self.scale, self.softcap or 1.0),
            *(NUM_SCALARS, is_ragged(self.meta, batch, self.columns), bounds is not None, mask is not None),
            *(self.softcap is not None, self.sink_logits is not None, *to_merge, *constants),
            *(rows, page_size, tiles.block_m, tiles.block_n, *factors),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            enable_fp_fusion=True,
            maxnreg=MAX_REGISTERS if dtypes is None else None,
        )
        if is_merged and not is_last:
            merge(parts, part_lse, out, lse, is_rotated=is_rotated)


def _is_readable(plane: torch.Tensor, *, may_be_transposed: bool = False) -> bool:
    """Says whether numbers lie as kernels read them; they count within a tile in 32 bits."""
    if plane.stride(3) == 1 or plane.shape[3] == 1:
        return True
    return may_be_transposed and plane.stride(2) == 1 and plane.stride(3) * plane.shape[3] < 1 << 31


def outputs(query: torch.Tensor, value_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocates an attention's output `[B, Hq, q, value_dim]` and its log-sum-exp `[B, Hq, q]`."""
    shape = query.shape[:3]
    return query.new_empty(*shape, value_dim), query.new_empty(shape, dtype=torch.float32)
