"""What caches and experts cost in time and memory, side by side in one run: ``hfkv bench`` without its screen."""

from hfkv.bench.checks import Verdict, check_results, read_targets
from hfkv.bench.contenders import PEERS, Contender
from hfkv.bench.results import Result, Row, Table
from hfkv.bench.runner import run
from hfkv.bench.setting import SUITES, BenchError, Case, Setting, cases_of
from hfkv.bench.suites.moe_layers import MOE_PEERS
from hfkv.models.layer_shapes import MLA_SHAPES, MOE_SHAPES
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
    "Result",
    "Row",
    "Setting",
    "Table",
    "Verdict",
    "cases_of",
    "check_results",
    "read_targets",
    "run",
]
