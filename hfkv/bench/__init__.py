"""What caches and experts cost in time and memory, side by side in one run: ``hfkv bench`` without its screen."""

from hfkv.bench.checks import Verdict, check_results, read_targets
from hfkv.bench.contenders import PEERS, Contender
from hfkv.bench.errors import BenchError
from hfkv.bench.grid import run
from hfkv.bench.moe_layers import MOE_PEERS, MOE_SHAPES
from hfkv.bench.results import Result, Row, Table
from hfkv.bench.setting import SUITES, Setting
from hfkv.bench.shapes import SHAPES

__all__ = [
    "MOE_PEERS",
    "MOE_SHAPES",
    "PEERS",
    "SHAPES",
    "SUITES",
    "BenchError",
    "Contender",
    "Result",
    "Row",
    "Setting",
    "Table",
    "Verdict",
    "check_results",
    "read_targets",
    "run",
]
