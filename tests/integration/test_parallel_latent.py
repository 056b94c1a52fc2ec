"""Latent attention whose heads tensor parallelism shares out over two processes: each absorbs its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integration.parallel_latent import KV, latent_model, said

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    model = latent_model()
    model.save_pretrained(tmp_path)
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, "-m", "tests.integration.parallel_latent", str(tmp_path)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    stock = said(model, None)
    for kv in (None, *KV):
        alone = said(model, kv)
        for found in (rank[str(kv)] for rank in ranks):
            assert found["tokens"] == alone["tokens"], kv
            torch.testing.assert_close(
                torch.tensor(found["logits"]), torch.tensor(alone["logits"]), atol=1e-3, rtol=0, msg=str(kv)
            )
            assert found["heads"] == ([] if kv is None else [2]), kv
        if kv == "none":
            assert alone["tokens"] == stock["tokens"]
            assert alone["heads"] == [4]
