"""The example of data parallelism runs as it is, in one process and in several."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hfkv
from hfkv import tiny_lm

EXAMPLE = Path(__file__).parents[2] / "examples" / "data_parallel.py"
PROMPTS = ("import os", "def main(", "class Reader:", "for line in", "x = [")
NEW_TOKENS = 8


def run(*launcher, folder, prompts=PROMPTS, kv="int8"):
    """The lines the example writes, and what it says."""
    (folder / "prompts.txt").write_text("\n\n".join(prompts) + "\n")
    options = ["--out", "texts.jsonl", "--new-tokens", str(NEW_TOKENS), "--batch-size", "2", "--kv", kv]
    process = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLE), "prompts.txt", *options],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()], process.stderr


def torchrun(processes):
    return "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)


def test_one_process_continues_every_prompt_as_generate_does(tmp_path):
    lines, said = run(folder=tmp_path)
    assert [line["prompt"] for line in lines] == list(PROMPTS)
    model, tokenizer = tiny_lm.load(torch.float32)
    with hfkv.patch(model, kv="int8"):
        for line in lines:
            ids = tokenizer(line["prompt"], return_tensors="pt").input_ids
            text = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
            assert line["text"] == tokenizer.decode(text, skip_special_tokens=True)
    assert "prompts: 5, processes: 1," in said
    assert "5/5" in said  # the bar


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["more than processes", "fewer"])
def test_two_processes_write_what_one_does(tmp_path, prompts):
    alone, _ = run(folder=tmp_path, prompts=prompts)
    (tmp_path / "texts.jsonl").unlink()
    together, said = run(*torchrun(2), folder=tmp_path, prompts=prompts)
    assert together == alone
    assert f"prompts: {len(prompts)}, processes: 2," in said
    assert said.count("processes:") == 1
    share = -(-len(prompts) // 2)
    assert f"{share}/{share}" in said
    assert "5/5" not in said  # the bar is of one process's share


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kv", "int7"), "int7"),
        (("nowhere.txt",), "could not be read"),
        (("empty.txt",), "there is no prompt"),
        (("--out", "nowhere/texts.jsonl"), "there is no folder"),
    ],
)
def test_a_mistake_is_told_before_the_model_is_loaded(tmp_path, words, message):
    (tmp_path / "empty.txt").write_text("\n\n")
    process = subprocess.run(
        [sys.executable, str(EXAMPLE), *words, "--model", "/not/looked/for"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 2
    assert message in process.stderr
    assert "Traceback" not in process.stderr
