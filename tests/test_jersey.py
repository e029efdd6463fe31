"""The embedded data set: seeded, honest about its answers, and not to be guessed from the wording."""

import collections
import itertools
import json
import random

import numpy as np
import pytest

from avg_llava_jax.config import from_dict, to_dict
from avg_llava_jax.configs import jersey as jersey_config
from avg_llava_jax.data import jersey
from avg_llava_jax.data.grounding import Words, patch_centres, patch_words
from avg_llava_jax.data.images import resized
from avg_llava_jax.data.jersey import Jersey
from avg_llava_jax.data.sources import LlavaJson

MODEL = from_dict(json.loads(json.dumps(jersey_config.model().to_dict())))


def asked(record):
    turns = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
    return list(zip(turns[::2], turns[1::2], strict=True))


def true_answer(scene, question):
    """Read the answer off the scene by the words of the question, apart from the code that asked."""
    words = question.strip("?.").replace("'s", "").split()
    shirts = {player.shirt: player for player in scene.players}
    numbers = {str(player.number): player for player in scene.players}
    about = [shirts.get(word) or numbers.get(word) for word in words if word in shirts or word in numbers]
    if not about:
        if {"weather", "sky"} & set(words):
            return scene.weather
        return scene.field if {"play", "field", "ground"} & set(words) else scene.team
    (player,) = about
    side = {"left": -1, "right": 1}
    for word in words:
        if word.lower() in side:
            row = [other for other in scene.players if other.row == player.row]
            return str(
                sorted(row, key=lambda p: p.x)[sorted(p.x for p in row).index(player.x) + side[word.lower()]].number
            )
    return str(player.number) if player.shirt in words else player.shirt


def test_every_answer_is_true():
    source, seen = Jersey(turns=10, neighbours=2), collections.Counter()
    for index in range(300):
        record = source[index]
        for question, answer in asked(record):
            assert true_answer(record["images"][0].scene, question) == answer, (index, question)
            seen[question.split()[0]] += 1
    assert len(seen) >= 6


def test_a_record_follows_from_its_number_and_splits_share_no_scene():
    one, again = Jersey(turns=3)[7], Jersey(turns=3)[7]
    assert one == again
    assert np.array_equal(np.asarray(one["images"][0].load()), np.asarray(again["images"][0].load()))
    scenes = {split: {Jersey(split)[i]["images"][0].scene for i in range(200)} for split in jersey.SPLITS}
    assert sum(map(len, scenes.values())) == len(set().union(*scenes.values()))
    assert Jersey(seed=1)[7] != one
    with pytest.raises(ValueError, match="splits train, router, validation, test"):
        Jersey("dev")
    with pytest.raises(IndexError, match="4 records"):
        Jersey(size=4)[4]


def test_no_turn_gives_another_ones_answer_away():
    source = Jersey(turns=10)
    for index in range(200):
        scene = source[index]["images"][0].scene
        rng = random.Random(index)
        facts = [question.fact for coarse in (True, False) for question in jersey.questions(scene, rng, coarse, 3)]
        assert len(facts) == len(set(facts))


def test_pictures_are_reduced_alike_under_every_pillow(monkeypatch):
    """Halved in width, then in height, each rounded; in one call of `resize` Pillow 13 turns the order of tall ones."""
    drawn = []
    monkeypatch.setattr(jersey, "resized", lambda image, *how: drawn.append(image) or resized(image, *how))
    for index in range(50):
        reduced = np.asarray(Jersey(split="test")[index]["images"][0].load())
        values = np.asarray(drawn.pop()).astype(int)
        narrow = (values[:, ::2] + values[:, 1::2] + 1) // 2
        np.testing.assert_array_equal(reduced, (narrow[::2] + narrow[1::2] + 1) // 2)


def test_pairs_and_shares_of_the_test_questions():
    source = Jersey("test", paired=True)
    records = [source[i] for i in range(300)]
    assert collections.Counter(r["kind"] for r in records) == {"coarse": 100, "fine": 100, "near": 100}
    assert len({r["id"] for r in records}) == 300
    threes = [records[i : i + 3] for i in range(0, 300, 3)]
    for number, three in enumerate(threes):
        scenes = [record["images"][0].scene for record in three]
        pair = (0, 1) if number % 2 == 0 else (0, 2)
        assert scenes[pair[0]] == scenes[pair[1]] and len(set(scenes)) == 2
        assert len(scenes[1].players) >= 6 and len(scenes[2].players) <= 2


def test_wording_tells_fine_from_near_by_nothing():
    """Both kinds draw the same phrases about the same colours and numbers."""
    source = Jersey("test", paired=True, size=6000)
    phrases = {"fine": collections.Counter(), "near": collections.Counter()}
    for index in range(6000):
        record = source[index]
        if record["kind"] != "coarse":
            (question, _), *_ = asked(record)
            known = [w for w in question.strip("?.").split() if w in jersey.COLOURS or w.isdigit()]
            phrases[record["kind"]][question.replace(known[0], "{}")] += 1
    assert phrases["fine"].keys() == phrases["near"].keys()


def test_crowds_are_only_asked_about_what_all_can_see():
    records = [Jersey(crowd=1.0, near=0.5)[index] for index in range(20)]
    assert all(record["kind"] == "coarse" and len(record["images"][0].scene.players) > 10 for record in records)
    shirts = [player.shirt for player in records[0]["images"][0].scene.players]
    assert len(shirts) > len(set(shirts))


def test_lists_go_from_one_side_to_the_other():
    ways = collections.Counter()
    for index in range(40):
        record = Jersey(roster=1.0, near=0.0)[index]
        (question, answer), *rest = asked(record)
        players, words = record["images"][0].scene.players, answer.split()
        assert not rest and len(words) == 2 * len(players)
        named = {frozenset((player.shirt, str(player.number))): player for player in players}
        order = [named[frozenset(words[at : at + 2])] for at in range(0, len(words), 2)]
        assert [player.row for player in order] == sorted(player.row for player in players)
        way = 1 if question.rstrip(".?").endswith("right") else -1
        assert all(way * (b.x - a.x) > 0 for a, b in itertools.pairwise(order) if a.row == b.row)
        ways[way] += 1
    assert min(ways.values()) > 5


def test_tile_counts_and_unpadding_all_occur():
    from avg_llava_jax.data.geometry import visual_count
    from avg_llava_jax.data.tiles import tile_count

    counts = {tile_count(size, MODEL) for size in jersey.SIZES}
    assert counts == {3, 4, 5}
    assert len({visual_count(size, MODEL, 64) for size in jersey.SIZES}) > 4


def test_written_out_and_read_back(tmp_path):
    source = Jersey("test", paired=True)
    file = jersey.write(source, 6, tmp_path)
    read = LlavaJson(str(file), str(tmp_path / "images"))
    assert len(read) == 6
    for index in range(6):
        record, ours = read[index], source[index]
        assert record["conversations"] == ours["conversations"] and record["kind"] == ours["kind"]
        assert np.array_equal(np.asarray(record["images"][0].load()), np.asarray(ours["images"][0].load()))


def test_patches_are_named_by_the_box_in_front():
    config = from_dict(to_dict(MODEL) | {"pinpoints": [[96, 192], [192, 96]]})
    size = (192, 96)  # fills the mosaic of two tiles exactly
    centres = patch_centres(size, config)
    assert centres.shape == (3, 64, 2)
    assert centres[0, 0].tolist() == [12, 6] and centres[1, 0].tolist() == [6, 6] and centres[2, 0].tolist() == [102, 6]
    named = patch_words([Words((0, 0, 192, 96), (5,)), Words((96, 0, 192, 48), (6, 7))], size, config)
    assert named[1].reshape(8, 8, 2)[..., 0].tolist() == [[5] * 8] * 8
    assert named[2].reshape(8, 8, 2)[:4].tolist() == [[[6, 7]] * 8] * 4
    assert named[2].reshape(8, 8, 2)[4:].tolist() == [[[5, -1]] * 8] * 4
    assert (named[0].reshape(8, 8, 2)[:4, 4:, 0] == 6).all()
