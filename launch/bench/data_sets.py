"""Two data sets from PyPI as LLaVA JSON, for `other_data` and `lora`.

    easy-vqa    pip install easy-vqa        one shape in 64 x 64 pixels; of each picture up to eight questions
    digits      pip install scikit-learn    boards of its handwritten digits on coloured cards: one or two large ones
                                            (near) or five to nine small ones (fine); which digit is on a card, which
                                            card has a digit, and the board's colour (coarse)

Splits share no picture, and no picture of a digit.
"""

from __future__ import annotations

import collections
import json
import pathlib
import random
from collections.abc import Iterator
from typing import Any

from PIL import Image, ImageDraw

from avg_llava_jax.data.jersey import COLOURS
from avg_llava_jax.files import write_whole

TURNS = 8
CARDS = {name: rgb for name, rgb in COLOURS.items() if name not in ("black", "white", "grey")}
SIZES = ((192, 96), (96, 192), (180, 90), (192, 192), (96, 96))

Turn = tuple[str, str, str]  # question, answer, kind
Picture = tuple[Image.Image, list[Turn]]


def easy_vqa(split: str, count: int) -> Iterator[Picture]:
    """Pictures of easy-vqa: of the training set, or of the two halves of its test set."""
    import easy_vqa as source

    of = "train" if split == "train" else "test"
    texts, answers, numbers = getattr(source, f"get_{of}_questions")()
    paths = getattr(source, f"get_{of}_image_paths")()
    asked = collections.defaultdict(list)
    for text, answer, number in zip(texts, answers, numbers, strict=True):
        kind = "yes or no" if answer in ("yes", "no") else "shape or colour"
        asked[number].append((text, answer, kind))
    kept = [number for number in sorted(paths) if split == "train" or number % 2 == (split == "test")]
    for number in kept[:count]:
        yield Image.open(paths[number]).convert("RGB"), asked[number]


def digits(split: str, count: int) -> Iterator[Picture]:
    """Boards of scikit-learn's handwritten digits, a different fifth of them in each of the last two splits."""
    from sklearn.datasets import load_digits

    found, parts = load_digits(), {"train": (0, 1, 2), "held_out": (3,), "test": (4,)}[split]
    by_digit = collections.defaultdict(list)
    for row, digit in enumerate(found.target):
        if row % 5 in parts:
            by_digit[int(digit)].append(found.images[row])
    for number in range(count):
        rng = random.Random(f"digits-{split}-{number}")
        yield board(rng, by_digit, near=rng.random() < 0.5)


def board(rng: random.Random, by_digit: dict[int, list[Any]], near: bool) -> Picture:
    """One board, with its questions in random order."""
    size = rng.choice(SIZES)
    ground = rng.choice(("black", "white", "grey"))
    image = Image.new("RGB", size, COLOURS[ground])
    side = rng.randint(70, 86) if near else rng.randint(28, 31)
    places = [(x, y) for x in range(1, size[0] - side, side + 1) for y in range(1, size[1] - side, side + 1)]
    chosen = rng.sample(places, min(len(places), rng.randint(1, 2) if near else rng.randint(5, 9)))
    cards = rng.sample(sorted(CARDS), len(chosen))
    turns: list[Turn] = []
    kind = "near" if near else "fine"
    for (x, y), card, digit in zip(chosen, cards, rng.sample(range(10), len(chosen)), strict=True):
        ImageDraw.Draw(image).rectangle((x, y, x + side - 1, y + side - 1), fill=COLOURS[card])
        ink = Image.fromarray((rng.choice(by_digit[digit]) * 255 / 16).astype("uint8"))
        width = round(0.72 * side)
        mask = ink.resize((width, width), Image.Resampling.BICUBIC)
        image.paste((12, 12, 12), (x + (side - width) // 2, y + (side - width) // 2), mask)
        if rng.random() < 0.5:
            turns.append((f"Which digit is on the {card} card?", str(digit), kind))
        else:
            turns.append((f"What colour is the card with a {digit}?", card, kind))
    turns.insert(0, ("What colour is the board?", ground, "coarse"))
    rng.shuffle(turns)
    return image, turns


SOURCES = {"easy-vqa": easy_vqa, "digits": digits}


def write(name: str, folder: pathlib.Path, pictures: int, held_out: int) -> None:
    """Write the images and a JSON file of each split: train (conversations), router, held_out, test (single questions).

    pictures: to train on. held_out: to calibrate on, and as many to test on.

    `router` asks about the pictures of `train`; the other two ask two questions about each picture, of two kinds where
    it has them.
    """
    for split, count in (("train", pictures), ("held_out", held_out), ("test", held_out)):
        if (folder / f"{split}.json").exists():
            continue
        (folder / split).mkdir(parents=True, exist_ok=True)
        files: dict[str, list[Any]] = {split: []} | ({"router": []} if split == "train" else {})
        for number, (image, turns) in enumerate(SOURCES[name](split, count)):
            file = f"{split}/{number}.png"
            image.save(folder / file)
            first = turns[0]
            other = next((turn for turn in turns if turn[2] != first[2]), turns[-1])
            asked = {"train": [turns[:TURNS]], "router": [[first]]} if split == "train" else {split: [[first], [other]]}
            for which, conversations in asked.items():
                for some in conversations:
                    files[which].append(record_of(f"{which}-{len(files[which])}", file, some))
        for which, records in reversed(files.items()):
            write_whole(folder / f"{which}.json", json.dumps(records, indent=1) + "\n")


def record_of(name: str, file: str, turns: list[Turn]) -> dict[str, Any]:
    """A record of LLaVA JSON."""
    said = []
    for question, answer, _ in turns:
        said.append({"from": "human", "value": ("" if said else "<image>\n") + question})
        said.append({"from": "gpt", "value": answer})
    return {"id": name, "image": file, "conversations": said} | ({"kind": turns[0][2]} if len(turns) == 1 else {})
