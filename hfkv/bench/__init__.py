"""What caches and experts cost in time and memory, side by side in one run: ``hfkv bench`` without its screen."""

from hfkv.bench.checks import Verdict, check_results, read_targets
from hfkv.bench.contenders import PEERS, Contender
from hfkv.bench.errors import BenchError
from hfkv.bench.grid import run
from hfkv.bench.mla import run_mla
from hfkv.bench.mla_setting import SUITES, Case, MLASetting
from hfkv.bench.mla_shapes import MLA_SHAPES
from hfkv.bench.moe_layers import MOE_PEERS, MOE_SHAPES
from hfkv.bench.results import Result, Row, Table
from hfkv.bench.setting import Setting
from hfkv.models.shapes import SHAPES

__all__ = [
    "MLA_SHAPES",
    "MOE_PEERS",
    "MOE_SHAPES",
    "PEERS",
    "SHAPES",
    "SUITES",
    "BenchError",
    "Case",
    "Contender",
    "MLASetting",
    "Result",
    "Row",
    "Setting",
    "Table",
    "Verdict",
    "check_results",
    "read_targets",
    "run",
    "run_mla",
]
