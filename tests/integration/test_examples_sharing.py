"""The examples of sharing run as they are, each in a process of its own."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors import safe_open
from transformers import AutoTokenizer

import hfkv
from hfkv import tiny_lm
from tests.tiny import llama

EXAMPLES = Path(__file__).parents[2] / "examples"
LINES = ("first line", "What does this do?", "tell me of <<reply>> lists")


def run(name, *arguments, folder):
    """The example's process, when it has ended."""
    return subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "160"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def printed(name, *arguments, folder):
    """What the example prints."""
    process = run(name, *arguments, folder=folder)
    assert process.returncode == 0, process.stderr
    return process.stdout


def columns(text):
    """The cells of a table's rows."""
    return [[cell.strip() for cell in line.strip("│ ").split("│")] for line in text.splitlines() if line[:1] == "│"]


@pytest.mark.slow
def test_shared_system_prompt_is_read_once(tmp_path):
    text = printed("shared_system_prompt.py", folder=tmp_path)
    first, *later = columns(text)
    assert len(later) == 4
    assert first[1] == "0"
    assert all(int(row[1].replace(",", "")) >= 1500 and int(row[2]) < 100 for row in later)
    assert {row[-1] for row in (first, *later)} == {"yes"}
    assert "reuse_stats: 4 of 5 prompts" in text


def test_shared_system_prompt_takes_any_model(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm.PATH)
    tokenizer.chat_template = None
    llama(vocab_size=300).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    main = runpy.run_path(str(EXAMPLES / "shared_system_prompt.py"))["main"]
    main(model=str(tmp_path), dtype="float32", budget="1MiB", new_tokens=2)
    text = capsys.readouterr().out
    assert [row[1] for row in columns(text)] != ["0"] * 5
    assert "reuse_stats: 4 of 5 prompts" in text


@pytest.mark.slow
def test_rag_reads_the_document_once(tmp_path):
    text = printed("rag_one_document.py", folder=tmp_path)
    rows = {name: [*map(str.strip, cells)] for name, *cells in columns(text)}
    assert len(rows) == 4
    for name, (_, tokens, nbytes, right) in rows.items():
        assert int(right.split()[0]) >= 4  # of 8; by chance it would be none
        shares = "fork" in name
        assert (int(tokens.replace(",", "")) < 3000) == shares
        assert (int(nbytes.replace(",", "")) < 15e6) == shares
    assert "The answers are the same in all four ways." in text


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A folder where a chat of all lines has been, and what each process printed."""
    folder = tmp_path_factory.mktemp("chat")
    return folder, [printed("chat_that_survives.py", line, "--new-tokens", 16, folder=folder) for line in LINES]


def test_a_chat_of_many_processes_is_that_of_one_without_any_cache_of_ours(chat):
    folder, outputs = chat
    model, tokenizer = tiny_lm.load(torch.float32)
    text = torch.tensor([[tokenizer.bos_token_id]])
    for index, line in enumerate(LINES):
        turn = f"{chr(10) if index else ''}user: {line}\nassistant: "
        ids = tokenizer(turn, add_special_tokens=False, return_tensors="pt").input_ids
        held, read = text.shape[1], ids.shape[1]
        text = torch.cat((text, ids), dim=1)
        text = model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=16, do_sample=False)
        assert tokenizer.decode(text[0], skip_special_tokens=True) in outputs[index]
        assert f"read {read + (not index)} tokens, wrote 16" in outputs[index]
        assert (f"loaded {held} tokens in" in outputs[index]) == (index > 0)
    cache = hfkv.KVCache.load(folder / "chat.safetensors", model)
    assert torch.equal(cache.holds_tokens, text)
    assert list(folder.iterdir()) == [folder / "chat.safetensors"]


def test_a_chat_starts_anew_where_it_is_told_to(chat, tmp_path):
    folder, outputs = chat
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"no cache at all")
    arguments = (LINES[0], "--new-tokens", 16, "--file", other, "--forget")
    again = printed("chat_that_survives.py", *arguments, folder=folder)
    assert again.splitlines()[:3] == outputs[0].splitlines()[:3]
    with safe_open(other, "pt") as file:
        assert file.get_tensor("ids").shape == (1, len("user: first line\nassistant: ") + 17)


def test_a_chat_reads_only_what_is_new(chat):
    model, tokenizer = tiny_lm.load(torch.float32)
    counts = []
    with hfkv.patch(model):
        cache = hfkv.KVCache.load(chat[0] / "chat.safetensors", model)
        model.model.embed_tokens.register_forward_pre_hook(lambda module, args: counts.append(args[0].shape[1]))
        reply = runpy.run_path(str(EXAMPLES / "chat_that_survives.py"))["reply"]
        text, num_new = reply(model, tokenizer, cache, "more", 4)
    assert num_new == 4
    assert counts == [len("\nuser: more\nassistant: "), 1, 1, 1, 1]
    assert torch.equal(cache.holds_tokens, text)


def test_a_reply_that_came_to_its_end_is_not_ended_twice():
    turn = runpy.run_path(str(EXAMPLES / "chat_that_survives.py"))["turn"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm.PATH)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<eos>{% endfor %}assistant: "
    )

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for held, line, expected in (
        ("", "a", "user: a<eos>assistant: "),
        ("user: a<eos>assistant: b", "c", "<eos>user: c<eos>assistant: "),
        ("user: a<eos>assistant: b<eos>", "c", "user: c<eos>assistant: "),
    ):
        assert turn(tokenizer, line, torch.tensor([ids(held)], dtype=torch.long))[0].tolist() == ids(expected)


def test_a_damaged_file_is_refused_in_one_line(chat, tmp_path):
    damaged = bytearray((chat[0] / "chat.safetensors").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "chat.safetensors").write_bytes(damaged)
    process = run("chat_that_survives.py", LINES[1], folder=tmp_path)
    assert process.returncode == 1
    assert process.stdout == ""
    (error,) = [line for line in process.stderr.splitlines() if line and "Loading weights" not in line]
    assert error.startswith("error: chat.safetensors cannot be loaded: it is damaged or was edited")
    assert "--forget" in error
    assert (tmp_path / "chat.safetensors").read_bytes() == damaged


@pytest.mark.parametrize("what", ["cut", "of another model"])
def test_a_file_that_does_not_fit_is_refused_in_one_line(chat, tmp_path, capsys, what):
    model, file = tiny_lm.PATH, tmp_path / "chat.safetensors"
    whole = (chat[0] / "chat.safetensors").read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if what == "cut" else whole)
    if what != "cut":
        model = tmp_path
        other, tokenizer = tiny_lm.load(torch.float32)
        with torch.no_grad():
            other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        other.save_pretrained(model)
        tokenizer.save_pretrained(model)
    main = runpy.run_path(str(EXAMPLES / "chat_that_survives.py"))["main"]
    capsys.readouterr()
    with pytest.raises(typer.Exit) as caught:
        main(LINES[1], file, forget=False, model=str(model), dtype="float32", new_tokens=4)
    assert caught.value.exit_code == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line and "Loading weights" not in line]
    expected = "cannot be loaded: it is no whole safetensors file" if what == "cut" else "was filled by other weights"
    assert error.startswith(f"error: {file} {expected}")
