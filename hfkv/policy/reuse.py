"""`Reuse`: share the prompt prefixes of one call with the next, within a budget."""

from __future__ import annotations

from dataclasses import dataclass

from hfkv.policy.units import read_bytes, say_bytes


@dataclass(frozen=True)
class Reuse:
    """Keeps the pages of prompts and replies for later calls of the patched model that begin alike.

    Args:
        budget: the most bytes to keep besides the caches of running calls: a number, or ``"512MiB"``, ``"2GiB"``. The
            pages used least recently go first.
        salt: calls share only with calls of the same salt: a tenant's name, say.

    Raises:
        TypeError, ValueError: naming the field, what was given and what is allowed.
    """

    budget: int | str = "2GiB"
    salt: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.salt, str):
            raise TypeError(f"Reuse.salt must be a str, got {self.salt!r}")
        object.__setattr__(self, "budget", read_bytes("Reuse.budget", self.budget))

    @property
    def budget_bytes(self) -> int:
        """The budget in bytes."""
        assert isinstance(self.budget, int)
        return self.budget

    def __str__(self) -> str:
        return say_bytes(self.budget_bytes)
