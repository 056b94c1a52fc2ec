"""How routers spread tokens over experts, recorded while a model runs."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from hfkv.models.probe import base_model
from hfkv.policy.ports import port
from hfkv.sparse_moe.layer import SparseMoE
from hfkv.sparse_moe.routing import is_recomputing
from hfkv.sparse_moe.stats_picture import draw_loads

if TYPE_CHECKING:
    from rich.table import Table
else:
    Table = Any  # for typing.get_type_hints, without the import

logger = logging.getLogger("hfkv")

# A router is collapsed when its spread is below this: 0 is always the same K experts, 1 is perfect balance.
COLLAPSED_SPREAD = 0.25
# Nothing is said of a router that made fewer choices than this an expert.
CHOICES_AN_EXPERT = 4
# Columns of text.
ROUTING_WIDTH = 120


@dataclass(frozen=True)
class LayerRouting:
    """What one layer's router did.

    Attributes:
        name: the name of the module that holds the experts.
        load: each expert's share of the choices, E numbers that sum to 1; under soft routing its mean weight.
        num_tokens: tokens routed, without padding.
        top_k: experts a token, K; 1 for soft routing, where one expert may get all the weight.
        num_dropped: (token, slot) pairs beyond a capacity.
    """

    name: str
    load: tuple[float, ...]
    num_tokens: int
    top_k: int
    num_dropped: int

    @property
    def num_experts(self) -> int:
        return len(self.load)

    @property
    def entropy(self) -> float:
        """The entropy of the load, as a share of perfect balance's: 0 is a single expert, 1 is balance."""
        return self._nats / math.log(self.num_experts)

    @property
    def dead(self) -> tuple[int, ...]:
        """The experts that no token chose."""
        return tuple(expert for expert, share in enumerate(self.load) if share == 0.0)

    @property
    def imbalance(self) -> float:
        """The largest load, in multiples of the mean: 1 is balance, E / K is the most."""
        return max(self.load) * self.num_experts

    @property
    def spread(self) -> float:
        """How far the load is spread, by entropy: 0 where all tokens choose the same K experts, 1 at balance."""
        least, most = math.log(self.top_k), math.log(self.num_experts)
        return 1.0 if least == most else max(0.0, (self._nats - least) / (most - least))

    @property
    def collapsed(self) -> bool:
        """Whether the router sends nearly everything to the same K experts, by enough choices to tell."""
        is_told = self.num_tokens * self.top_k >= CHOICES_AN_EXPERT * self.num_experts
        return is_told and self.spread < COLLAPSED_SPREAD

    @property
    def _nats(self) -> float:
        return -sum(share * math.log(share) for share in self.load if share > 0)


class RoutingStats:
    """A recorder of routing: a context manager around forwards of a model, and afterwards their statistics.

    On leaving, a router that has collapsed is named in a warning. Leaving takes all hooks off; entering again goes on
    counting.
    """

    def __init__(self, model: nn.Module) -> None:
        self._experts = dict(_experts_of(model))
        if not self._experts:
            raise ValueError(
                f"{type(model).__name__} has no experts behind transformers' experts interface (modules with has_gate "
                "and _apply_gate), so there is nothing to record"
            )
        self._model = model
        self._handles: list[Any] = []
        self._attention_mask: torch.Tensor | None = None
        self._counts: dict[str, _RoutingCounts] = {}

    def __enter__(self) -> RoutingStats:
        if self._handles:
            raise RuntimeError("these routing statistics are being recorded already")
        self._handles = [
            # PEFT's generate calls the model inside.
            base_model(self._model).register_forward_pre_hook(self._before_model, with_kwargs=True),
            base_model(self._model).register_forward_hook(self._after_model, always_call=True),
        ]
        for name, (experts, layer) in self._experts.items():
            hook = partial(self._before_experts, name, layer)
            self._handles.append(experts.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._attention_mask = None
        if self.collapsed:
            logger.warning("%s", self.verdict)

    def reset(self) -> None:
        """Forgets what has been counted."""
        self._counts = {}

    @property
    def layers(self) -> list[LayerRouting]:
        """One entry for each layer that has run, in the order of the model."""
        return [self._counts[name].report(name) for name in self._experts if name in self._counts]

    @property
    def collapsed(self) -> list[LayerRouting]:
        """The layers whose routers have collapsed."""
        return [layer for layer in self.layers if layer.collapsed]

    @property
    def verdict(self) -> str:
        """One sentence: which routers have collapsed, or that none has."""
        layers = self.layers
        if not layers:
            return "no expert has run yet"
        if not self.collapsed:
            return f"no collapsed router in {len(layers)} layers"
        names = ", ".join(layer.name for layer in self.collapsed)
        return (
            f"collapsed routers in {len(self.collapsed)} of {len(layers)} layers: {names}: nearly all tokens go to the "
            'same experts, and the others learn nothing; train with a balance loss (balance_coef) or balance="bias"'
        )

    def plot(self, path: Path | str) -> Path:
        """Draws the loads as a heat map, layers by experts, to a PNG file.

        Raises:
            ImportError: matplotlib is not installed.
            RuntimeError: nothing was recorded.
        """
        return draw_loads(self.layers, Path(path))

    def __rich__(self) -> Table:
        return port("routing_table")(self)

    def __str__(self) -> str:
        return port("plain_text")(self, ROUTING_WIDTH)

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        is_padding = isinstance(mask, torch.Tensor) and mask.ndim == 2
        self._attention_mask = mask if is_padding else None

    def _after_model(self, *ignored: Any) -> None:
        self._attention_mask = None

    @torch.no_grad()
    def _before_experts(
        self, name: str, layer: SparseMoE | None, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if is_recomputing():
            return
        given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
        index, weights = given["top_k_index"], given["top_k_weights"]
        last = None if layer is None else layer.last_forward
        mask = self._token_mask(index.shape[0])
        if last is not None and last.token_mask is not None:
            mask = last.token_mask if mask is None else mask & last.token_mask
        kept = torch.ones_like(index, dtype=torch.float32)
        if mask is not None:
            kept = kept * mask.to(index.device)[:, None]
        is_soft = last is not None and last.is_soft
        if name not in self._counts:
            num_experts = int(experts.num_experts)  # type: ignore[arg-type]
            self._counts[name] = _RoutingCounts(num_experts, 1 if is_soft else index.shape[1], index.device)
        dropped = kept.new_zeros(()) if last is None or last.kept is None else (kept * ~last.kept).sum()
        self._counts[name].add(index, kept * weights.float() if is_soft else kept, kept[:, 0].sum(), dropped)

    def _token_mask(self, num_tokens: int) -> torch.Tensor | None:
        """The mask [T], bool, of this forward's tokens: with a cache, the last columns."""
        mask = self._attention_mask
        if mask is None or mask.shape[0] == 0 or num_tokens % mask.shape[0]:
            return None
        length = num_tokens // mask.shape[0]
        return mask[:, -length:].reshape(-1).bool() if 0 < length <= mask.shape[1] else None


class _RoutingCounts:
    """The sums of one layer, kept on its device: only reading them waits for it."""

    def __init__(self, num_experts: int, top_k: int, device: torch.device) -> None:
        self.num_experts = num_experts
        self.top_k = top_k
        # float64 counts exactly to 2**53. One place more takes the choices that other processes compute.
        self.load = torch.zeros(num_experts + 1, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.dropped = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, index: torch.Tensor, share: torch.Tensor, tokens: torch.Tensor, dropped: torch.Tensor) -> None:
        places = index.flatten().clamp(max=self.num_experts).long()
        self.load.scatter_add_(0, places, share.flatten().double())
        self.tokens += tokens
        self.dropped += dropped

    def report(self, name: str) -> LayerRouting:
        load = self.load[:-1].cpu()
        shares = tuple((load / load.sum().clamp(min=1e-9)).tolist())
        return LayerRouting(name, shares, int(self.tokens), self.top_k, int(self.dropped))


def routing_stats(model: nn.Module) -> RoutingStats:
    """Records how the routers of a model spread tokens over experts.

    Works on `SparseMoE` layers and on transformers' own MoE models: it listens at their experts, which are given what
    the router chose, and changes nothing. Counting waits for no device. The second forward of gradient checkpointing is
    not counted, nor is padding, where the model is called with ``attention_mask=`` of two dimensions, or a layer with
    ``token_mask=``.

        with hfkv.routing_stats(model) as stats:
            model(**inputs)
        print(stats)

    Args:
        model: a module with such experts inside.

    Returns:
        The recorder; see `RoutingStats`.

    Raises:
        ValueError: the model has no such experts.
    """
    return RoutingStats(model)


def _experts_of(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, SparseMoE | None]]]:
    """The experts modules by the name of the module around them, with that module where it is a `SparseMoE`."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        # In the class: a wrapper that hands on attributes is not what it wraps.
        if not (hasattr(type(module), "_apply_gate") and hasattr(module, "has_gate")):
            continue
        parts = name.split(".")
        around = [".".join(parts[:length]) for length in range(len(parts))]
        own = [outer for outer in around if isinstance(modules[outer], SparseMoE)]
        layer = modules[own[-1]] if own else None
        yield own[-1] if own else around[-1] if around else name, (module, cast("SparseMoE | None", layer))
