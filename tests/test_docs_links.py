"""The pages of the documentation: every relative link leads somewhere, and every page can be found from the index."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FOLDERS = ("use", "understand", "extend", "reference")
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])


def links(page: Path) -> list[tuple[Path, str]]:
    """The files that a page links inside the repository, each with its anchor."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = []
    for url in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", url):
            path, _, anchor = url.partition("#")
            found.append(((page.parent / path).resolve() if path else page, anchor))
    return found


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for path, anchor in links(page):
        assert path.exists(), f"{page.name} links {path}"
        assert not anchor or anchor in anchors(path), f"{page.name} links {path.name}#{anchor}"


def test_every_page_is_in_the_index_and_in_the_list_of_its_folder() -> None:
    index = {path for path, _ in links(DOCS / "README.md")}
    for folder in FOLDERS:
        listed = {path for path, _ in links(DOCS / folder / "README.md")}
        pages = set((DOCS / folder).glob("*.md"))
        assert pages <= index, folder
        assert pages - {DOCS / folder / "README.md"} <= listed, folder


def test_the_readme_ends_in_four_links() -> None:
    *_, last, _ = (ROOT / "README.md").read_text().strip().split("\n\n")
    assert re.findall(r"\]\(([^)]+)\)", last) == [f"docs/{folder}/README.md" for folder in FOLDERS]


def test_a_dead_link_and_a_dead_anchor_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A title: `of` 2\n[a](gone.md#x) [b](#a-title-of-2) [c](https://a.b/c.md)\n```\n[d](code.md)\n```\n"
    )
    assert links(page) == [(tmp_path / "gone.md", "x"), (page, "a-title-of-2")]
    assert anchors(page) == {"a-title-of-2"}
