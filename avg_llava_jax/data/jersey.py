"""`jersey`, a generated data set: team photos with questions that need coarse or fine granularities.

A scene shows players in rows in front of their fans. There are three kinds of questions, the last two worded alike:

    coarse  the team's colour, the field, the weather: any granularity suffices
    fine    the number of the player in orange, the shirt of number 7, in a photo of up to ten small players
            who stand close together: many details in a small area
    near    the same questions about one or two players who fill the picture: a coarse granularity suffices

A record depends only on (seed, split, index); no two splits share a scene.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from avg_llava_jax.data.images import resized

COLOURS = {
    "red": (214, 32, 38),
    "orange": (250, 132, 20),
    "yellow": (250, 222, 40),
    "green": (20, 118, 54),
    "blue": (28, 70, 200),
    "purple": (122, 44, 160),
    "pink": (250, 140, 190),
    "brown": (118, 68, 34),
    "black": (24, 24, 28),
    "white": (246, 246, 246),
    "grey": (140, 144, 150),
    "cyan": (60, 208, 224),
}
FIELDS = {"grass": (96, 172, 84), "clay": (190, 110, 72), "sand": (224, 204, 150), "snow": (226, 234, 242)}
SKIES = {"sunny": (126, 190, 245), "cloudy": (168, 176, 186), "rainy": (104, 116, 134), "night": (18, 22, 52)}
SKINS = ((255, 219, 184), (224, 172, 128), (160, 108, 72), (96, 62, 44))

# Sizes in pixels (width, height): every shape of mosaic, without and with padding, enlarged and reduced.
SIZES = (
    (192, 96), (192, 96), (96, 192), (96, 192), (180, 90), (90, 180), (200, 100), (160, 96), (96, 150),
    (288, 96), (100, 300), (180, 190),
)  # fmt: skip

PHRASES = {
    "team": ("What is the team's colour?", "Which colour do the fans wear?", "What colour is the team?"),
    "field": ("What do they play on?", "What is the field made of?", "Which kind of ground is it?"),
    "weather": ("What is the weather?", "How is the sky?", "What is the weather like?"),
    "number": ("What number is the player in {}?", "Which number wears the {} shirt?", "Read the number on {}."),
    "shirt": ("What colour does number {} wear?", "Which shirt has the number {}?", "The shirt of number {}?"),
    "list right": ("List the players from left to right.", "Who is there, left to right?"),
    "list left": ("List the players from right to left.", "Who is there, right to left?"),
    "left": ("Who stands left of {}?", "Which number is left of {}?", "Left of number {} is who?"),
    "right": ("Who stands right of {}?", "Which number is right of {}?", "Right of number {} is who?"),
}
ROW_STEP = 0.74  # distance between rows in heights of a player: shirts stay visible, legs do not
INK = (12, 12, 12)
SKY, FANS = 0.16, 0.34  # shares of the height at which the sky and the stand end
COARSE = ("team", "field", "weather")
SPLITS = ("train", "router", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Player:
    """A player: shirt colour, number 0..9, row, centre of the feet (x, y) and height in pixels of the picture."""

    shirt: str
    number: int
    row: int
    x: float
    y: float
    height: float
    skin: int


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content of a picture; `size` is (width, height) in pixels."""

    size: tuple[int, int]
    near: bool
    team: str
    field: str
    weather: str
    players: tuple[Player, ...]
    grain: int


@dataclasses.dataclass(frozen=True)
class SceneImage:
    """A picture that is drawn when it is loaded, with the interface of `images.ImageRef`."""

    scene: Scene
    name: str

    @property
    def size(self) -> tuple[int, int]:
        """Size (width, height) in pixels."""
        return self.scene.size

    def load(self) -> Image.Image:
        """Draws the RGB picture."""
        return draw(self.scene).copy()

    def digest(self) -> bytes:
        """Digest of the scene, which determines the pixels."""
        return hashlib.sha256(repr(self.scene).encode()).digest()


def make_scene(rng: random.Random, near: bool, crowd: bool = False) -> Scene:
    """Composes a scene: positions, shirts and numbers of the players.

    Colours and numbers are distinct within a scene, except in a `crowd`, which fills the picture with players for phase
    `grounding`.
    """
    width, height = rng.choice(SIZES)
    if crowd:
        tall = rng.uniform(26, 44)
        step = tall * rng.uniform(0.62, 0.72)
        rows = [int(width / step)] * int(1 + (height - tall) / (tall * ROW_STEP))
    elif near:
        count, tall = rng.choice((1, 2, 2)), rng.uniform(0.72, 0.92) * height
        tall = min(tall, 1.45 * width / count)
        step, rows = (width / count) * rng.uniform(0.8, 0.95), [count]
    else:
        tall, count = rng.uniform(29, 34), rng.randint(8, 10)
        step = tall * rng.uniform(0.62, 0.66)
        deep = -(-count // min(int(width / step), 5))
        rows = [count // deep + (row < count % deep) for row in range(deep)]
    block = tall + (len(rows) - 1) * tall * ROW_STEP
    bottom = height - rng.uniform(0.02, 1) * max(2.0, height * 0.96 - block) * (0.3 if near else 1)
    bottom = min(height - 1.0, max(bottom, block + 1))

    middle = rng.uniform(max(rows) * step / 2, width - max(rows) * step / 2)

    drawn = rng.choices if crowd else rng.sample
    shirts = drawn(sorted(COLOURS), k=sum(rows))
    numbers = drawn(range(10), k=sum(rows))
    players = []
    for row, columns in enumerate(rows):
        start = middle - columns * step / 2
        for column in range(columns):
            players.append(
                Player(
                    shirt=shirts[len(players)],
                    number=numbers[len(players)],
                    row=row,
                    x=start + (column + 0.5) * step + rng.uniform(-0.03, 0.03) * step,
                    y=bottom - (len(rows) - 1 - row) * tall * ROW_STEP + rng.uniform(-0.02, 0.02) * tall,
                    height=tall,
                    skin=rng.randrange(len(SKINS)),
                )
            )
    return Scene(
        size=(width, height),
        near=near,
        team=rng.choice(sorted(COLOURS)),
        field=rng.choice(sorted(FIELDS)),
        weather=rng.choice(sorted(SKIES)),
        players=tuple(players),
        grain=rng.randrange(2**31),
    )


def words(scene: Scene) -> list[dict[str, Any]]:
    """Boxes of the shirts for phase `grounding`, (x0, y0, x1, y1) in pixels, later ones in front, with their text."""
    width, height = scene.size
    sky, fans = SKY * height, FANS * height
    named = [
        {"box": [0, 0, width, sky], "text": scene.weather},
        {"box": [0, sky, width, fans], "text": scene.team},
        {"box": [0, fans, width, height], "text": scene.field},
    ]
    for player in scene.players:
        unit = player.height
        box = [player.x - 0.3 * unit, player.y - 0.76 * unit, player.x + 0.3 * unit, player.y - 0.24 * unit]
        named.append({"box": box, "text": f"{player.shirt} {player.number}"})
    return named


@functools.cache
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=pixels)


@functools.lru_cache(maxsize=1024)  # the test pictures of a quickstart, which reads them twice
def draw(scene: Scene) -> Image.Image:
    """Draws the scene as an RGB picture, at twice its size and then reduced for smooth edges; not to be changed."""
    width, height = (2 * side for side in scene.size)
    rng = random.Random(scene.grain)
    image = Image.new("RGB", (width, height), FIELDS[scene.field])
    pen = ImageDraw.Draw(image)
    sky, fans = int(height * SKY), int(height * FANS)
    pen.rectangle((0, 0, width, sky), fill=SKIES[scene.weather])
    _weather(pen, rng, scene.weather, width, sky)
    pen.rectangle((0, sky, width, fans), fill=COLOURS[scene.team])
    for _ in range(width * (fans - sky) // 160):  # heads in the stand
        x, y = rng.randrange(width), rng.randrange(sky, max(fans, sky + 1))
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=rng.choice(SKINS))
    shades = {by: tuple(max(0, min(255, c + by)) for c in FIELDS[scene.field]) for by in range(-14, 15)}
    for _ in range(width * height // 900):  # blades, clods, crystals
        x, y = rng.randrange(width), rng.randrange(fans, height)
        pen.line((x, y, x + 3, y), fill=shades[rng.randrange(-14, 15)])
    for player in scene.players:
        _player(pen, player, COLOURS[scene.team])
    return resized(image, scene.size, Image.Resampling.BOX)


def _weather(pen: ImageDraw.ImageDraw, rng: random.Random, weather: str, width: int, sky: int) -> None:
    if weather == "sunny":
        x = rng.randrange(sky, width - sky) if width > 2 * sky + 1 else width // 2
        pen.ellipse((x - sky // 3, sky // 6, x + sky // 3, sky // 6 + 2 * sky // 3), fill=(255, 236, 90))
    for _ in range(width // 40):
        x, y = rng.randrange(width), rng.randrange(max(sky, 1))
        if weather == "cloudy":
            pen.ellipse((x - 16, y - 5, x + 16, y + 5), fill=(214, 219, 224))
        elif weather == "rainy":
            pen.line((x, y, x - 4, y + 9), fill=(178, 196, 226), width=2)
            pen.line((x + 9, y - 8, x + 5, y + 1), fill=(178, 196, 226), width=2)
        elif weather == "night":
            pen.ellipse((x, y, x + 2, y + 2), fill=(250, 250, 214))


def _player(pen: ImageDraw.ImageDraw, player: Player, team: tuple[int, int, int]) -> None:
    """Draws one player, feet at (x, y); all lengths are shares of the height, doubled for the drawing's scale."""
    unit, x, foot = 2 * player.height, 2 * player.x, 2 * player.y

    def box(left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        return (x + left * unit, foot - top * unit, x + right * unit, foot - bottom * unit)

    shirt, skin = COLOURS[player.shirt], SKINS[player.skin]
    edge = max(1, round(unit / 50))
    pen.rectangle(box(-0.12, 0.12, -0.03, 0.0), fill=skin)
    pen.rectangle(box(0.03, 0.12, 0.12, 0.0), fill=skin)
    pen.rectangle(box(-0.17, 0.25, 0.17, 0.11), fill=team, outline=(40, 40, 40), width=edge)
    pen.rounded_rectangle(box(-0.3, 0.76, 0.3, 0.24), radius=0.06 * unit, fill=shirt, outline=(40, 40, 40), width=edge)
    pen.ellipse(box(-0.1, 0.98, 0.1, 0.77), fill=skin, outline=(40, 40, 40), width=edge)
    pen.rectangle(box(-0.19, 0.72, 0.19, 0.28), fill=(255, 255, 255))  # the number stands on a white bib
    font = _font(max(6, round(0.56 * unit)))
    place = (x, foot - 0.5 * unit)
    pen.text(place, str(player.number), font=font, fill=INK, anchor="mm", stroke_width=edge, stroke_fill=INK)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and its answer. `fact` names what the answer reveals: no two turns of a conversation share one."""

    kind: str
    text: str
    answer: str
    fact: tuple


def questions(scene: Scene, rng: random.Random, coarse: bool, neighbours: int = 0) -> list[Question]:
    """The coarse or the detailed questions that the scene can answer, shuffled, one phrasing each.

    neighbours: largest number of questions that ask who stands beside a player.
    """
    found = []

    def add(sort: str, about: object, answer: object, fact: tuple) -> None:
        kind = "coarse" if coarse else "near" if scene.near else "fine"
        found.append(Question(kind, rng.choice(PHRASES[sort]).format(about), str(answer), fact))

    if coarse:
        for sort in COARSE:
            add(sort, "", getattr(scene, sort), (sort,))
    else:
        for at, player in enumerate(scene.players):
            fact = ("player", at)
            sort = rng.choice(("number", "shirt"))
            about, answer = (player.shirt, player.number) if sort == "number" else (player.number, player.shirt)
            add(sort, about, answer, fact)
        pairs = [pair for pair in itertools.pairwise(scene.players) if pair[0].row == pair[1].row]
        for left, right in rng.sample(pairs, min(neighbours, len(pairs))):
            if rng.random() < 0.5:
                add("left", right.number, left.number, ("pair", left))
            else:
                add("right", left.number, right.number, ("pair", left))
    rng.shuffle(found)
    return found


def roster(scene: Scene, rng: random.Random) -> Question:
    """A question for the list of all players, row by row from the back, shirt or number first: "red 7 blue 3".

    It trains the lookup of a shirt by its number, of a number by its shirt, and of neighbours.
    """
    way = rng.choice(("list right", "list left"))
    players = sorted(scene.players, key=lambda player: (player.row, player.x if way == "list right" else -player.x))
    pairs = [(player.shirt, str(player.number)) for player in players]
    if rng.random() < 0.5:
        pairs = [(number, shirt) for shirt, number in pairs]
    answer = " ".join(word for pair in pairs for word in pair)
    return Question("near" if scene.near else "fine", rng.choice(PHRASES[way]), answer, ("roster",))


@dataclasses.dataclass(frozen=True)
class Jersey:
    """A random-access source of records in the LLaVA form (`id, images, conversations, kind`).

    split       train (the model), router (phase two), validation, test: disjoint scenes
    turns       largest number of questions about one picture in a conversation
    near        share of pictures with one or two players
    crowd       share of pictures with too many players for detailed questions, for phase `grounding`
    coarse      share of coarse questions, as long as any are left
    roster      share of conversations that list the players, shirt and number, in order instead
    neighbours  largest number of questions per picture about who stands beside whom. Default 0: they are hard
                for other reasons than detail, and the shipped model was not trained to answer them
    paired      single questions in triples, coarse, fine and near, two of them about the same picture

    Raises ValueError for an unknown split, IndexError for an index outside 0..size-1.
    """

    split: str = "train"
    size: int = 1_000_000
    seed: int = 0
    turns: int = 6
    near: float = 1 / 3
    crowd: float = 0.0
    coarse: float = 0.25
    roster: float = 0.0
    neighbours: int = 0
    paired: bool = False

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"jersey has the splits {', '.join(SPLITS)}, not {self.split!r}")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(f"jersey/{self.split} has {self.size} records, asked for {index}")
        if self.paired:
            name, asked, scene = self._paired(index)
        else:
            name = f"{self.split}-{self.seed}-{index}"
            rng = random.Random(name)
            crowd = rng.random() < self.crowd
            scene = make_scene(rng, near=rng.random() < self.near, crowd=crowd)
            if crowd:
                asked = questions(scene, rng, coarse=True)
            else:
                asked = [roster(scene, rng)] if rng.random() < self.roster else self._turns(scene, rng)
        turns = []
        for number, question in enumerate(asked):
            turns.append({"from": "human", "value": ("<image>\n" if number == 0 else "") + question.text})
            turns.append({"from": "gpt", "value": question.answer})
        return {
            "id": f"{name}-{asked[0].kind}" if self.paired else name,
            "images": [SceneImage(scene, name)],
            "conversations": turns,
            "kind": asked[0].kind,
            "words": words(scene),
        }

    def _paired(self, index: int) -> tuple[str, list[Question], Scene]:
        """The picture's name, one question, and the scene.

        Each triple of records has two pictures, a team and a near one. The coarse question is about the
        team in even triples and about the near picture in odd ones.
        """
        three, kind = divmod(index, 3)
        near = (three % 2 == 1, False, True)[kind]
        name = f"{self.split}-{self.seed}-{three}-{'near' if near else 'team'}"
        scene = make_scene(random.Random(name), near)
        return name, questions(scene, random.Random(f"{name}/{kind}"), kind == 0, self.neighbours)[:1], scene

    def _turns(self, scene: Scene, rng: random.Random) -> list[Question]:
        pools = {True: questions(scene, rng, True), False: questions(scene, rng, False, self.neighbours)}
        asked: list[Question] = []
        while len(asked) < self.turns and (pools[True] or pools[False]):
            coarse = bool(pools[True]) and (rng.random() < self.coarse or not pools[False])
            asked.append(pools[coarse].pop())
        return asked


def write(source: Jersey, count: int, folder: str | Path) -> Path:
    """Writes the first `count` records as LLaVA JSON and PNG files; returns the path of the JSON file."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(count):
        record = source[index]
        (image,) = record.pop("images")
        path = folder / "images" / f"{image.name}.png"
        if not path.exists():
            image.load().save(path)
        records.append({**record, "image": path.name})
    target = folder / f"{source.split}.json"
    target.write_text(json.dumps(records, indent=1))
    return target
