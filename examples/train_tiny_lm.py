"""Train the bundled tiny-lm: a byte-level language model of the Python standard library's sources.

    python examples/train_tiny_lm.py --out tiny-lm

The default arguments are those of the bundled model; docs/understand/tiny-lm.md holds its figures.
"""

from __future__ import annotations

import random
import string
import sysconfig
import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hfkv.eval.passkey import MIN_LENGTH, NUM_DIGITS, pass_key_prompt

PAD, BOS, EOS = 256, 257, 258
HELD_OUT = ("bisect", "calendar", "contextlib", "fnmatch", "fractions", "graphlib", "heapq", "queue", "sched", "shelve",
            "textwrap")  # fmt: skip
# Tests, generated tables, and what stands apart from the library proper.
SKIPPED_FOLDERS = {"site-packages", "encodings", "pydoc_data", "lib2to3", "turtledemo", "test", "tests", "idle_test"}
BATCH_TOKENS = 8192
# Several pass keys share a row at first, their distances growing at a pace of the whole row in RAMP_STEPS; then each
# stands alone in its row, and longer rows join.
RAMP_STEPS = 800
ALONE_FROM_STEP = 750
LONG_FROM_STEP = 1200
TEXT_FROM_STEP = 1500  # the pass keys are learned: more plain text
DIGIT_WEIGHT = 8.0
DIGIT_WEIGHT_ALONE = 24.0
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer whose first 256 ids are the byte values."""
    # The printable characters that stand for bytes in a byte-level vocabulary (GPT-2's table).
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    vocab = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
    )


def training_files(root: Path) -> list[Path]:
    """List the standard library's sources to train on, without the held-out modules and all tests."""
    files = []
    for file in sorted(root.rglob("*.py")):
        folders = set(file.relative_to(root).parts[:-1])
        generated = file.name.startswith("_sysconfigdata") or file.match("html/entities.py")
        if folders & SKIPPED_FOLDERS or generated or (not folders and file.stem in HELD_OUT):
            continue
        files.append(file)
    return files


def held_out_text(root: Path) -> str:
    """Join the held-out modules, ASCII characters only."""
    texts = [(root / f"{name}.py").read_text(encoding="utf-8") for name in HELD_OUT]
    return "\n".join(texts).encode("ascii", "ignore").decode("ascii")


class Rows:
    """Training rows, each BOS and `context` tokens, drawn from text, pass keys and repeated strings."""

    def __init__(self, files: list[Path], seed: int):
        contents = [file.read_bytes() for file in files]
        ids = [torch.frombuffer(bytearray(content + b"\0"), dtype=torch.uint8).short() for content in contents]
        for file_ids in ids:
            file_ids[-1] = EOS
        self.stream = torch.cat(ids)
        self.filler = b"\n".join(contents).decode("ascii", "ignore")
        self.seed = seed

    def batch(self, step: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the rows of one step.

        Returns:
            Ids [B, context + 1] and the loss weights [B, context] of the tokens after BOS.
        """
        rng = random.Random(f"{self.seed}-{step}")
        rows, weights = zip(*(self._row(rng, step, context) for _ in range(BATCH_TOKENS // context)), strict=True)
        return torch.stack(rows), torch.stack(weights)

    def _row(self, rng: random.Random, step: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
        kind = rng.random()
        text_share, pass_key_share = (0.5, 0.4) if step < TEXT_FROM_STEP else (0.78, 0.15)
        if kind < text_share:
            start = rng.randrange(len(self.stream) - context)
            ids, weights = self.stream[start : start + context].tolist(), [1.0] * context
        elif kind < text_share + pass_key_share:
            ids, weights = self._pass_keys(rng, step, context)
        else:
            ids, weights = self._repeats(rng, context)
        return torch.tensor([BOS, *ids]), torch.tensor(weights)

    def _pass_keys(self, rng: random.Random, step: int, context: int) -> tuple[list[int], list[float]]:
        is_alone = step >= ALONE_FROM_STEP
        longest = context - NUM_DIGITS - 1
        if not is_alone:
            longest = min(longest, MIN_LENGTH + 32 + (longest - MIN_LENGTH) * step // RAMP_STEPS)
        ids: list[int] = []
        weights: list[float] = []
        while (room := context - len(ids) - NUM_DIGITS - 1) >= MIN_LENGTH and not (is_alone and ids):
            is_whole = is_alone and rng.random() < 0.5
            length = room if is_whole else min(room, round(MIN_LENGTH * (longest / MIN_LENGTH) ** rng.random()))
            prompt, key = pass_key_prompt(rng, self.filler, length)
            ids += [*prompt.encode(), *key.encode(), EOS]
            digit_weight = DIGIT_WEIGHT_ALONE if is_alone else DIGIT_WEIGHT
            weights += [1.0] * length + [digit_weight] * NUM_DIGITS + [1.0]
        num_left = context - len(ids)
        start = rng.randrange(len(self.stream) - context)
        text = self.stream[start : start + num_left].tolist()
        if is_alone:
            return text + ids, [1.0] * num_left + weights
        return ids + text, weights + [1.0] * num_left

    @staticmethod
    def _repeats(rng: random.Random, context: int) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        alphabet = string.ascii_letters + string.digits + " \n._"
        while len(ids) < context:
            length = round(8 * (context / 16) ** rng.random())
            text = [*"".join(rng.choices(alphabet, k=length)).encode()]
            ids += [*text, *text, EOS]
            # Nothing foretells the first occurrence.
            weights += [0.0] * length + [1.0] * (length + 1)
        return ids[:context], weights[:context]


def row_context(step: int) -> int:
    """Return the row length of one step: 512 at first, later 1,024 and 2,176 (2,048 and an answer) now and then."""
    if step < LONG_FROM_STEP or step % 2:
        return 512
    return 2176 if step % 8 == 0 else 1024


def lr_scale(step: int, steps: int, decay_steps: int) -> float:
    """Return the factor of the learning rates: 50 steps up, constant, then linearly to zero."""
    return min((step + 1) / 50, 1.0, (steps - step) / decay_steps)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Give the hidden matrices to Muon, the embedding and the norms to AdamW."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write a bfloat16 copy of the model, its tokenizer and the held-out text."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder, save_jinja_files=False)
    held_out = held_out_text(Path(sysconfig.get_path("stdlib")))
    (folder / "held_out.txt").write_text(held_out, encoding="ascii", newline="\n")


def main(
    out: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("tiny-lm"),
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 5000,
    decay_steps: Annotated[int, typer.Option(help="Last steps, over which the learning rates fall to zero.")] = 1800,
    seed: Annotated[int, typer.Option(help="Seed of weights and rows.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    checkpoint: Annotated[Path | None, typer.Option(help="File to save to every 250 steps, and resume from.")] = None,
    is_compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the model.")] = True,
) -> None:
    """Train tiny-lm and write its folder."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )
    optimizers = make_optimizers(model)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    first_step = 0
    if checkpoint and checkpoint.exists():
        state = torch.load(checkpoint)
        first_step = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
    rows = Rows(training_files(Path(sysconfig.get_path("stdlib"))), seed)
    forward = torch.compile(model, dynamic=False) if is_compiled else model

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("train", total=steps, completed=first_step, note="")
        losses: list[float] = []
        num_tokens, since = 0, time.perf_counter()
        for step in range(first_step, steps):
            for optimizer, rate in zip(optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * lr_scale(step, steps, decay_steps)
            ids, weights = rows.batch(step, row_context(step))
            with torch.autocast("cpu", torch.bfloat16):
                logits = forward(ids[:, :-1], use_cache=False).logits
            token_losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            loss = (token_losses * weights.flatten()).sum() / weights.sum()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

            losses.append(loss.item())
            num_tokens += weights.numel()
            if (step + 1) % 25 == 0:
                speed = num_tokens / (time.perf_counter() - since)
                is_digit = weights.flatten() > 1
                note = (
                    f"loss {sum(losses) / len(losses):.3f} key digits {token_losses[is_digit].mean().item():.3f} "
                    f"{speed:,.0f} tokens/s"
                )
                progress.console.print(f"step {step + 1} {note}")
                progress.update(task, completed=step + 1, note=note)
                losses, num_tokens, since = [], 0, time.perf_counter()
            if checkpoint and (step + 1) % 250 == 0:
                states = [optimizer.state_dict() for optimizer in optimizers]
                torch.save({"step": step + 1, "model": model.state_dict(), "optimizers": states}, checkpoint)
    save_model(model, out)


if __name__ == "__main__":
    typer.run(main)
