"""`CacheSuite`: what the suites of caches with keys and values a head have in common."""

from __future__ import annotations

from hfkv.bench.contenders import ours_on, peers
from hfkv.bench.models import build_model, check_room
from hfkv.bench.setting import Setting
from hfkv.bench.suite import Cell, Suite
from hfkv.bench.tokens import Tokens
from hfkv.models.shapes import Heads, shape_config, with_layers

# A step works on copies besides the caches themselves: of one layer, in fp32.
WORKING_COPIES = 4


class CacheSuite(Suite):
    """A suite of caches."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.config = shape_config(setting.shape, setting.model)
        self.model_layers = self.config.num_hidden_layers
        self.heads = Heads.of(self.config)
        self.contenders = [*peers(setting.peers, self.config, self.device), *ours_on(setting.kvs, self.config)]
        contexts = [max(setting.ragged)] if setting.ragged else setting.contexts
        self.cells = [Cell(context, setting.layers or self.num_layers(context)) for context in contexts]

    def num_layers(self, context: int) -> int:
        """Layers that are measured unless the setting says so."""
        return self.model_layers

    def layer_bytes(self, context: int) -> int:
        """Bytes of one layer's uncompressed cache."""
        return self.batch * context * self.heads.token_bytes(self.dtype)

    def cache_bytes(self, cell: Cell) -> int:
        return cell.layers * self.layer_bytes(cell.context)

    def check_memory(self, cell: Cell) -> None:
        """Refuses a cell of which not even one cache would fit, with a `BenchError`."""
        check_room(
            f"{self.batch} × {cell.context:,} tokens in {cell.layers} layers, one cache and its working copies,",
            (cell.layers + 1 + WORKING_COPIES * 4 // self.dtype.itemsize) * self.layer_bytes(cell.context),
            self.device,
            "take a shorter --context, a smaller --batch or fewer --layers",
        )

    def tokens(self, cell: Cell) -> Tokens:
        """What the caches of a cell are filled with, where there is room for it."""
        self.check_memory(cell)
        return Tokens(self.batch, cell.context, self.heads, self.dtype, self.device, self.setting.seed)


class ModelSuite(CacheSuite):
    """A suite of caches in whole models, which is built here."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        config = self.config if setting.layers is None else with_layers(self.config, setting.layers)
        self.model = build_model(config, self.dtype, self.device, setting.seed, setting.layers)
