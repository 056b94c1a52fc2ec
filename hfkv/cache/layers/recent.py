"""`RecentLayer`: a layer that holds its newest tokens and its sinks in more bits than the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from hfkv.cache.layers.layer import KVLayer
from hfkv.cache.layers.two_parts import TwoPartLayer, TwoPartTokens
from hfkv.cache.snapshot import HeldTokens, Part, PartShape
from hfkv.cache.view import KVView, new_wrapper
from hfkv.codecs.key_mean import KeyMean
from hfkv.policy.config import KVConfig
from hfkv.policy.recent import Recent
from hfkv.policy.window import Window

_NO_TENSOR = (
    "recent: which form of a token is read depends on the query, so that no single tensor can show the tokens of this "
    'layer; only the "hfkv" attention reads them'
)


@dataclass(frozen=True, eq=False)
class RecentTokens(TwoPartTokens):
    """The tokens of a `RecentLayer`, the snapshot behind its views.

    Attributes:
        recent: which tokens are read in the fine form.
        coarse: views of the keys and values of all tokens.
        fine: views of those of the newest tokens and the sinks.
    """

    recent: Recent
    coarse: tuple[KVView, KVView]
    fine: tuple[KVView, KVView]
    refusal = _NO_TENSOR

    @property
    def windowed(self) -> HeldTokens:
        return self.fine[0].held  # type: ignore[return-value]

    @property
    def parts(self) -> dict[Part, PartShape]:  # type: ignore[override]
        return dict(self.windowed.parts)


class RecentKeys(KVView):
    """The keys of a `RecentLayer`."""

    held: RecentTokens
    part = "key"


class RecentValues(KVView):
    """The values of a `RecentLayer`."""

    held: RecentTokens
    part = "value"


class RecentLayer(TwoPartLayer):
    """Every token in the config's codec, and the newest ones and the sinks once more in that of `Recent`.

    A query at t reads token j in the fine form where ``j > t - size or j < sinks``, counted within a row's text, and in
    the coarse form elsewhere: that depends on nothing else, so a text may come in any number of forwards. Both are
    encoded from the model's own keys and values when these come.

    Args:
        kv: policies of the layer, with `recent`.
        mean: see `KVLayer`.
    """

    no_tensor = _NO_TENSOR
    window = None

    def __init__(self, kv: KVConfig, mean: KeyMean | None = None) -> None:
        super().__init__()
        assert kv.recent is not None
        self.kv, self.recent = kv, kv.recent
        coarse = replace(kv, recent=None)
        window = Window(self.recent.size, sinks=self.recent.sinks)
        fine = replace(coarse, codec=self.recent.codec, window=window)
        self.parts = (KVLayer(coarse, mean=mean), KVLayer(fine, mean=mean))

    def __repr__(self) -> str:
        return f"RecentLayer({self.kv})"

    def graph_refusal(self) -> str | None:
        return "reads its newest tokens in another form than the rest (recent)"

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Does nothing: the parts begin by themselves."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends; returns views that only the ``"hfkv"`` attention can read. See `KVLayer.update`."""
        coarse, fine = (part.update(key_states, value_states) for part in self.parts)
        if self.parts[1].span.seen <= self.recent.size + self.recent.sinks:
            return fine  # all that any query sees is read there
        tokens = RecentTokens(self.recent, coarse, fine)  # type: ignore[arg-type]
        seen = self.parts[1].span.seen
        return _view(RecentKeys, tokens, key_states, seen), _view(RecentValues, tokens, value_states, seen)


def _view(kind: Any, tokens: RecentTokens, new: torch.Tensor, seen: int) -> Any:
    """A view of `seen` tokens, of which `new` are the newest, in the time that a step has."""
    batch, heads, _, head_dim = new.shape
    size, strides = (batch, heads, seen, head_dim), (heads * seen * head_dim, seen * head_dim, head_dim, 1)
    dtype = tokens.windowed.parts[kind.part].dtype
    view = new_wrapper(kind, size, strides, 0, None, dtype, torch.strided, new.device)
    view.held = tokens
    return view
