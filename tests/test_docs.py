"""README.md and docs/: links lead somewhere, every page is in the menu, and the reference names modules that exist."""

import re
import unicodedata
from pathlib import Path

import pytest
import yaml

from avg_llava_jax.commands.main import COMMANDS

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


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_commands_are_there_with_their_flags(page):
    """`avg-llava COMMAND --flag=...`, up to the end of the line that does not end in a backslash."""
    text = re.sub(r"\\{1,2}(\\n\",\n *\"|\n)", " ", page.read_text(encoding="utf-8"))  # of a notebook the JSON
    for command, rest in re.findall(r"avg-llava ([a-z][a-z-]*)([^\n`]*)", text):
        assert command in COMMANDS, f"{page.name}: avg-llava {command}"
        known = flags_of(COMMANDS[command])
        for flag in re.findall(r"(?<!\S)\[?--(?:no)?([a-z_]+)", rest):
            assert flag in known or flag == "help", f"{page.name}: avg-llava {command} --{flag}"


def flags_of(module: str) -> set[str]:
    """The flags that a command's module defines or takes over."""
    text = (ROOT / "avg_llava_jax" / "commands" / f"{module}.py").read_text(encoding="utf-8")
    found = set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", text)) | ({"config"} if "define_config" in text else set())
    own = re.search(r"cli\.run\(main, .*model_flags=(.*)\)", text)
    found |= {"checkpoint", "vision_tower", "dtype", "quantize"} if own is None or own[1] != "()" else set()
    return found.union(*map(flags_of, re.findall(r"adopt_module_key_flags\((\w+)\)", text)))


def test_the_reference_names_modules():
    modules = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference.md").read_text(), flags=re.MULTILINE)
    assert len(modules) == len(set(modules)) > 20
    missing = [name for name in modules if not (ROOT / (name.replace(".", "/") + ".py")).is_file()]
    assert not missing
