"""Public names stay, with their signatures: what `public_api.txt` lists is what there is."""

from pathlib import Path

from tests.public_api import listing


def test_public_names_and_signatures_are_as_listed() -> None:
    expected = Path(__file__).with_name("public_api.txt").read_text(encoding="utf-8").splitlines()
    found = listing().splitlines()
    gone = [line for line in expected if line not in found]
    new = [line for line in found if line not in expected]
    assert not gone, f"gone or changed: {gone}; a name that users import stays"
    assert not new, f"new: {new}; run `python -m tests.public_api > tests/public_api.txt` where that is meant"
