"""The text that a model is measured on before its cache is chosen, as token ids."""

from __future__ import annotations

from typing import Any

import torch

from hfkv import tiny_lm
from hfkv.models.probe import base_model

_GIVE_IDS = "give token ids: calibration=tokenizer(text, return_tensors='pt').input_ids[0]"


# Characters a token, at most as a rule: what is cut off a text need not be tokenized.
_CHARACTERS = 8


def calibration_ids(
    model: Any, calibration: torch.Tensor | str | None, most: int | None = None, is_local: bool = False
) -> torch.Tensor:
    """Token ids `[T]` of what a caller gave, int64.

    Args:
        model: a causal language model, or a `PeftModel` around one.
        calibration: ids `[T]` or `[1, T]`; a text; or None for the bundled one. For a text the tokenizer is loaded from
            where the model was.
        most: number of tokens that are wanted, or fewer; None for all.
        is_local: whether a tokenizer that would have to be fetched counts as none.

    Raises:
        TypeError: it is none of these.
        ValueError: it has not two tokens, or there is no tokenizer.
    """
    if isinstance(calibration, torch.Tensor):
        ids = calibration[0] if calibration.ndim == 2 and len(calibration) == 1 else calibration
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(
                f"calibration must be one row of token ids, got {calibration.dtype} {tuple(calibration.shape)}"
            )
    elif calibration is None or isinstance(calibration, str):
        text = tiny_lm.calibration_text() if calibration is None else calibration
        text = text if most is None else text[: _CHARACTERS * most]
        tokenizer = _tokenizer(base_model(model), is_local)
        # verbose: no warning that the text is longer than the model's context; it is cut into blocks.
        ids = torch.tensor(
            tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
            dtype=torch.int64,
        )
    else:
        raise TypeError(f"calibration must be token ids [T], a str or None, got {type(calibration).__name__}")
    if len(ids) < 2:
        raise ValueError(f"calibration has {len(ids)} tokens; give a text like those that the model will read")
    return ids.long()[:most]


def _tokenizer(model: Any, is_local: bool) -> Any:
    from transformers import AutoTokenizer

    where = getattr(model, "name_or_path", "")
    if not where:
        raise ValueError(
            f"{type(model).__name__} was not loaded from a folder or a name, where its tokenizer would be; {_GIVE_IDS}"
        )
    try:
        return AutoTokenizer.from_pretrained(where, local_files_only=is_local)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"there is no tokenizer in {where!r} ({reason}); {_GIVE_IDS}") from error
