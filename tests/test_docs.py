"""README.md and docs/: links lead somewhere, every page is in the menu, and the reference names modules that exist."""

import re
import unicodedata
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def prose(page: Path) -> str:
    """The page without its code."""
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Names of the headings that GitHub and the site's builder agree on."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = set()
    for title in re.findall(r"^#{1,6} +(.+?) *$", text, flags=re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", title.casefold())
        on_site = re.sub(
            r"[-\s]+", "-", unicodedata.normalize("NFKD", words).encode("ascii", "ignore").decode().strip()
        )
        if on_site == re.sub(r"\s", "-", words):
            found.add(on_site)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)(?: +\"[^\"]*\")?\)", prose(page))
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), f"{page.name} links to {link}, which is not there"
        if page.parent.name == "docs":
            assert target.parent == page.parent, f"{page.name} links to {link}, which is no part of the site"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}, and there is no such heading"


def test_every_page_is_in_the_menu_and_linked_from_the_first():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = {page.name for page in PAGES[1:]}
    assert sorted(site["nav"]) == sorted(pages)
    assert pages - {"index.md"} == set(re.findall(r"\]\((\w+\.md)\)", prose(ROOT / "docs" / "index.md")))


def test_the_reference_names_modules():
    modules = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference.md").read_text(), flags=re.MULTILINE)
    assert len(modules) == len(set(modules)) > 20
    missing = [name for name in modules if not (ROOT / (name.replace(".", "/") + ".py")).is_file()]
    assert not missing
