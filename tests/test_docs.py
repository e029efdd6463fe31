"""README.md and docs/: links lead somewhere, every page is in the menu, and the reference names modules that exist."""

import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import yaml

from avg_llava_jax.commands.main import COMMANDS
from avg_llava_jax.config import LanguageConfig, ModelConfig, RouterConfig, ScalerConfig, VisionConfig
from avg_llava_jax.data.conversation import IGNORE, IMAGE, Tokens
from avg_llava_jax.data.geometry import visual_index
from avg_llava_jax.data.packing import Sample, Shape, collate, prompt_index
from avg_llava_jax.inference.job import places_of

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


def test_the_page_all_of_it_shows_what_the_code_computes():
    """Tiles of 2 x 2 patches, an image of 4 x 2 pixels, granularity 2, pages 4, 2 and 5 of 10."""
    page = (ROOT / "docs" / "all_of_it.md").read_text()
    config = ModelConfig(
        vision=VisionConfig(image_size=2, patch_size=1, width=4, heads=1, layers=2),
        scaler=ScalerConfig(halvings=2),
        router=RouterConfig(heads=1),
        language=LanguageConfig(width=8, heads=1, kv_heads=1, layers=1, max_length=64),
        pinpoints=((4, 2), (2, 4)),
    )
    size, image = (4, 2), object()

    def shown(name: str) -> list[int]:
        """The integers of the first indented line that begins so."""
        line = next(line for line in page.splitlines() if line.startswith("    " + name))
        return [int(number) for number in re.findall(r"-?\d+", line.strip().removeprefix(name))]

    assert visual_index(size, config, 2).tolist() == [1, 2, 8, 15, -1, 9, 16, -1]
    assert "1 2, 8 15 -1, 9 16 -1" in page

    prompt = Sample("prompt", Tokens([7, 8, IMAGE, 9], [IGNORE] * 4), (size,), (image,))
    index, length = prompt_index(prompt, Shape(3, 1, 3, 1, 1.0), config, (2,))
    assert shown("index  ") == index[:length].tolist()
    ids, places = places_of(config, index[:length], np.array([7, 8, 9]), [4, 2, 5], 10)
    assert shown("ids") == ids.tolist() and shown("places") == places.tolist()

    sample = Sample("sample", Tokens([7, 8, IMAGE, 9, 5, 2], [IGNORE] * 4 + [5, 2]), (size,), (image,))
    batch = collate([sample], Shape(3, 1, 5, 2, 1.0), config, tiles=[np.zeros((3, 2, 2, 3), np.uint8)])
    for granularity in config.granularities:
        index, length = batch["index"][granularity][0], batch["length"][granularity][0]
        target_at = batch["target_at"][granularity][0]
        assert shown(f"index[{granularity}]") == [*index[:length], *target_at]
