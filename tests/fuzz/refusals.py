"""What hfkv refuses where stock code gives a result or fails in another way, each with the reason."""

from __future__ import annotations

import re

# Pattern of the message: reason.
REFUSALS = {
    "past_key_values holds .* tokens that the prompt does not continue": (
        "a used cache answers for its own text only; stock code appends whatever comes, silently wrong"
    ),
    "assisted decoding and prompt lookup of an encoder-decoder give the decoder its whole text": (
        "stock code reads what a used cache holds twice, silently wrong"
    ),
}


def is_documented(error: object) -> bool:
    """Whether an error is one of `REFUSALS`."""
    if not isinstance(error, ValueError | NotImplementedError):
        return False
    return any(re.search(pattern, str(error)) for pattern in REFUSALS)
