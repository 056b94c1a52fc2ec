"""Checks what a wheel holds: all modules of the tree, the assets, and nothing else.

python .ci/wheel.py TREE WHEEL OTHER_WHEEL: the tree both were built from, and two wheels that must hold the same.
"""

import sys
from pathlib import Path
from zipfile import ZipFile

PLACES = {"hfkv": "hfkv", "patches": "hfkv/patches"}  # folder of the tree -> where the wheel has it


def contents(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def main(tree: Path, wheel: Path, other: Path) -> None:
    held = contents(wheel)
    expected = {
        f"{place}/{path.relative_to(tree / folder).as_posix()}"
        for folder, place in PLACES.items()
        for path in (tree / folder).rglob("*")
        if path.is_file()
    }
    found = {name for name in held if ".dist-info/" not in name}
    if found != expected:
        sys.exit(f"{wheel.name} lacks {sorted(expected - found)} and has besides {sorted(found - expected)}")
    if held != contents(other):
        sys.exit("the wheel of the sdist and the wheel of the tree differ")
    print(f"{wheel.name}: {len(found)} files, the same from the tree and from the sdist")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
