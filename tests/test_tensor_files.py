"""Which file holds a tensor, and what a safetensors file may hold: as the library that the format comes from says."""

import json
import logging
import shutil
import struct

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from avg_llava_jax.convert import foreign, tensor_files
from avg_llava_jax.convert.tensors import Tensors
from tests.test_foreign import SOURCE, TOWER

NAME, ROUTER = "model.image_newline", "model.router.voter"
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
TWO = {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}


def write(path, header, body):
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def shapes_by_the_library(path):
    try:
        with safe_open(path, "np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return None


FILES = {
    "two": ({"a": ONE, "b": TWO}, 8),
    "in another order": ({"b": TWO, "a": ONE}, 8),
    "metadata": ({"__metadata__": {"format": "pt"}, "a": ONE}, 4),
    "none": ({}, 0),
    "a scalar": ({"a": ONE | {"shape": []}}, 4),
    "empty, between": ({"a": ONE, "z": ONE | {"shape": [0, 3], "data_offsets": [4, 4]}, "b": TWO}, 8),
    "padded header": (json.dumps({"a": ONE}) + "   ", 4),
    "bytes behind": ({"a": ONE, "b": TWO}, 9),
    "too short": ({"a": ONE, "b": TWO}, 7),
    "a hole": ({"a": ONE, "b": TWO | {"data_offsets": [5, 9]}}, 9),
    "a hole at the front": ({"b": TWO}, 8),
    "one place for two": ({"a": ONE, "b": ONE}, 4),
    "overlap": ({"a": ONE, "b": ONE | {"data_offsets": [2, 6]}}, 6),
    "empty, inside": ({"a": ONE | {"shape": [2], "data_offsets": [0, 8]}, "z": TWO | {"shape": [0]}}, 8),
    "a name twice": (f'{{"a": {json.dumps(ONE)}, "a": {json.dumps(TWO)}}}', 8),
    "shape as fraction": ({"a": ONE | {"shape": [1.0]}}, 4),
    "shape as text": ({"a": ONE | {"shape": ["1"]}}, 4),
    "shape below zero": ({"a": ONE | {"shape": [-1, -1]}}, 4),
    "no such dtype": ({"a": ONE | {"dtype": "Q8"}}, 4),
    "eighths of a byte": ({"a": ONE | {"dtype": "F4", "shape": [8]}}, 4),
    "half a character": (f'{{"a\\ud83d": {json.dumps(ONE)}}}', 4),
    "a list": ([ONE], 4),
}


@pytest.mark.parametrize("case", FILES)
def test_what_the_library_refuses_is_refused(tmp_path, case):
    path = tmp_path / "x.safetensors"
    write(path, FILES[case][0], bytes(FILES[case][1]))
    theirs = shapes_by_the_library(path)
    if theirs is None:
        with pytest.raises(ValueError, match=r"x\.safetensors") as error:
            tensor_files.read_header(path)
        assert "\n" not in str(error.value)
    else:
        assert {name: place.shape for name, place in tensor_files.read_header(path).items()} == theirs


def test_what_the_library_lets_through_is_refused_where_the_format_forbids_it(tmp_path):
    write(tmp_path / "x.safetensors", f'{{"a": {json.dumps(ONE)}, "a": {json.dumps(ONE)}}}', bytes(4))
    with pytest.raises(ValueError, match="its header has 'a' twice"):
        tensor_files.read_header(tmp_path / "x.safetensors")
    assert shapes_by_the_library(tmp_path / "x.safetensors") == {"a": (1,)}


def test_errors_say_what_is_wrong(tmp_path):
    for case, message in {
        "bytes behind": "1 trailing bytes belong to no tensor",
        "a hole": "1 bytes before tensor 'b' belong to no tensor",
        "overlap": "tensors 'a' and 'b' overlap",
        "too short": "ends before its tensor 'b'",
        "no such dtype": "dtype 'Q8', which safetensors do not have",
    }.items():
        write(tmp_path / "x.safetensors", FILES[case][0], bytes(FILES[case][1]))
        with pytest.raises(ValueError, match=message):
            tensor_files.read_header(tmp_path / "x.safetensors")


def test_random_damage_is_judged_as_by_the_library(tmp_path):
    """Headers with a few bytes changed, files cut or grown: read alike or refused by both."""
    rng, path = np.random.default_rng(0), tmp_path / "x.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16), "c": np.ones((), np.int64)}, path)
    whole, agreed = np.frombuffer(path.read_bytes(), np.uint8), [0, 0]
    digits = np.frombuffer(b'0123456789[],"', np.uint8)
    for _ in range(400):
        broken = whole.copy()
        at = rng.integers(8, 8 + int(whole[0]), rng.integers(0, 2))
        broken[at] = rng.choice(digits, len(at))
        path.write_bytes(broken.tobytes()[: len(whole) - rng.integers(-1, 2) % 3] + bytes(rng.integers(0, 2)))
        theirs = shapes_by_the_library(path)
        try:
            ours = {name: place.shape for name, place in tensor_files.read_header(path).items()}
        except ValueError:
            ours = None
        assert ours == theirs, path.read_bytes()
        agreed[ours is None] += 1
    assert min(agreed) > 20


@pytest.fixture
def sharded(tmp_path):
    """A folder in two shards and an index, a.safetensors with what sorts first."""
    folder, tensors = shutil.copytree(SOURCE, tmp_path / "sharded"), load_file(SOURCE / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-{n:05}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, part in parts.items():
        save_file({name: np.ascontiguousarray(tensors[name]) for name in part}, folder / file)
    index = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def change(path, **tensors):
    save_file(load_file(path) | tensors, path)


def index_without(folder, name):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = index["weight_map"].pop(name)
    path.write_text(json.dumps(index))
    return file


@pytest.mark.parametrize("name", [NAME, "model.norm.weight", ROUTER, "lm_head.weight"])
def test_the_index_says_which_shard_holds_a_tensor(sharded, caplog, name):
    right = load_file(SOURCE / "model.safetensors")[name]
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    (stale,) = {*index.values()} - {index[name]}
    change(sharded / stale, **{name: np.ascontiguousarray(right + 1)})
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(Tensors(sharded).read(name), right)
    assert f"{stale} holds a tensor '{name}' that is not read: model.safetensors.index.json says" in caplog.text
    foreign.load(sharded, TOWER)


def test_a_tensor_that_no_index_names_may_not_be_there_twice(sharded):
    right = load_file(SOURCE / "model.safetensors")[NAME]
    first = index_without(sharded, NAME)
    np.testing.assert_array_equal(Tensors(sharded).read(NAME), right)
    (other,) = {path.name for path in sharded.glob("*-of-*.safetensors")} - {first}
    change(sharded / other, **{NAME: right})
    np.testing.assert_array_equal(Tensors(sharded).read(NAME), right)
    change(sharded / other, **{NAME: right + 1})
    with pytest.raises(ValueError, match=rf"model-0000\d.*model-0000\d.*hold '{NAME}' with different bytes"):
        Tensors(sharded)


def test_an_index_and_its_shards_agree(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"x": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match=r"model-00001-of-00002.safetensors lacks tensor 'x'"):
        Tensors(sharded)
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"x": "../a.safetensors"}}))
    with pytest.raises(ValueError, match=r"tensor 'x' is in '../a.safetensors', which is not a file beside the index"):
        Tensors(sharded)


def test_the_first_kind_of_file_counts_as_in_transformers(sharded, caplog):
    """A single file before shards, safetensors before .bin; what is not read is named."""
    tensors = load_file(SOURCE / "model.safetensors")
    save_file(
        {name: np.ascontiguousarray(tensor + 1) for name, tensor in tensors.items()}, sharded / "model.safetensors"
    )
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(Tensors(sharded).read(NAME), tensors[NAME] + 1)
    assert "model.safetensors.index.json beside it is not: remove one of them" in caplog.text
    (sharded / "model.safetensors.index.json").unlink()
    (sharded / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}')
    np.testing.assert_array_equal(Tensors(sharded).read(NAME), tensors[NAME] + 1)


def test_shards_that_the_index_does_not_name_are_left_alone_and_named(sharded, caplog):
    save_file({NAME: np.zeros(64, np.float32)}, sharded / "model-00003-of-00003.safetensors")
    with caplog.at_level(logging.WARNING):
        assert Tensors(sharded).read(NAME).any()
    assert (
        "model-00003-of-00003.safetensors not read, because model.safetensors.index.json does not name it"
        in caplog.text
    )
