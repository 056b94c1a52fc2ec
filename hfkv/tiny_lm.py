"""The bundled model: a small byte-level Llama for demos, tests and examples that need no network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import dtype
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
else:
    dtype = Any  # for typing.get_type_hints, without the imports
    PreTrainedModel = Any
    PreTrainedTokenizerBase = Any

PATH = str(Path(__file__).parent / "assets" / "tiny-lm")


def load(dtype: dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the bundled model and its tokenizer, one token a byte.

    Args:
        dtype: dtype of the weights; None for the one they are stored in.

    Returns:
        The model, in evaluation mode on the CPU, and the tokenizer, which puts BOS before a text.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(PATH, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(PATH, dtype=dtype or "auto", local_files_only=True)
    return model.eval(), tokenizer


# Far behind what `hfkv eval` scores unless it is asked for more.
_CALIBRATION = 48 * 1024


def calibration_text() -> str:
    """The last 48 KiB of the held-out text, on which codecs are found for a promise where no other text is given."""
    return held_out_text()[-_CALIBRATION:]


def held_out_text() -> str:
    """The Python source files the model was not trained on, one after the other: ASCII, one byte a token."""
    return Path(PATH, "held_out.txt").read_text(encoding="ascii")
