"""PyTorch's `.bin` files: what torch.save writes is read without torch, and what else a pickle may say is not done."""

import json
import pickle
import shutil
import zipfile

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from avg_llava_jax.convert import convert, foreign, pickled
from avg_llava_jax.convert.tensors import Tensors
from tests.test_convert import SOURCE, TOWER


def test_every_kind_of_tensor(tmp_path):
    """Dtypes, views with strides and offsets, tied storages, parameters, a state dict with its metadata."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "whole": base,
        "rows": base[1:3],
        "columns": base[:, 2:4],
        "transposed": base.T,
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "bf16": torch.randn(2, 3, 4).to(torch.bfloat16).transpose(0, 2),
        "fp16": torch.randn(5).half(),
        "int64": torch.arange(5)[None],
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    found = Tensors(tmp_path)
    assert found.names == tensors.keys()
    for name, tensor in tensors.items():
        read, theirs = found.read(name), tensor.detach()
        assert read.shape == found.shape(name) == tuple(theirs.shape)
        assert str(read.dtype) == str(theirs.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(read.astype(np.float32), theirs.float().numpy())
    with pytest.raises(ValueError, match="'int64' has dtype I64"):
        found.dtype("int64")

    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    assert Tensors(tmp_path).names == module.state_dict().keys()


def test_bin_shards_are_the_same_model(tmp_path):
    """A checkpoint and a CLIP folder as `.bin`, the first in shards: the same parameters, the same tensors kept."""
    folder, tower = shutil.copytree(SOURCE, tmp_path / "source"), shutil.copytree(TOWER, tmp_path / "tower")
    weights = {name: torch.tensor(tensor) for name, tensor in load_file(SOURCE / "model.safetensors").items()}
    names = sorted(weights)
    shards = {"pytorch_model-00001-of-00002.bin": names[:70], "pytorch_model-00002-of-00002.bin": names[70:]}
    for file, part in shards.items():
        torch.save({name: weights[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    clip = load_file(TOWER / "model.safetensors")
    torch.save({name: torch.tensor(tensor) for name, tensor in clip.items()}, tower / "pytorch_model.bin")
    for path in (folder, tower):
        (path / "model.safetensors").unlink()
    jax.tree.map(np.testing.assert_array_equal, foreign.load(folder, tower).params, foreign.load(SOURCE, TOWER).params)
    assert "match in name, shape and dtype" in convert.dry_run(folder, tower)
    convert.import_folder(folder, tmp_path / "ours", tower)
    assert "post_layernorm" in str(Tensors(tmp_path / "ours", [foreign.UNUSED]).names)


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (exec, (f"open({str(self.target)!r}, 'w')",))


def write_zip(path, pickle_bytes, **entries):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle_bytes)
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)


def test_a_malicious_pickle_is_not_run(tmp_path):
    path, target = tmp_path / "pytorch_model.bin", tmp_path / "ran"
    torch.save({"a": torch.ones(2), "b": Malicious(target)}, path)
    with pytest.raises(ValueError, match="asks for '.*exec', which weights do not need; none of its code was run"):
        pickled.read_header(path)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # it is malicious
    for asks in (b"cos\nsystem\n(S'true'\ntR.", b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", b"cnumpy\ndtype\n."):
        write_zip(path, asks)
        with pytest.raises(ValueError, match="asks for '(os.system|builtins.eval|numpy.dtype)'"):
            pickled.read_header(path)


TENSOR = "ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = "((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI6\ntQ"


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ("(S'a'\n{}{}I0\n(I2\nI3\nt(I3\nI1\ntI00\nNtRd.", None),
        ("(S'a'\n{}{}I1\n(I2\nI3\nt(I3\nI1\ntI00\nNtRd.", "tensor 'a' exceeds its storage"),
        ("(S'a'\n{}{}I0\n(I2\nI3\nt(I3\nI-1\ntI00\nNtRd.", "a tensor that cannot exist"),
        ("(S'a'\n{}{}I0\n(I2\nI3\nt(I3\ntI00\nNtRd.", "truncated or damaged"),
        ("(S'epoch'\nI3\nd.", "its 'epoch' is not a tensor"),
        ("I3\n.", "it is not a state dict"),
        ("S'x'\nQ.", "refers to an object that is not a storage"),
        ("ctorch\nFloatStorage\n(tR.", "truncated or damaged"),
        ("(S'a'\n", "truncated or damaged|pickle data"),
    ],
)
def test_what_a_pickle_may_say(tmp_path, says, message):
    path = tmp_path / "pytorch_model.bin"
    storage = np.arange(6, dtype=np.float32)
    write_zip(path, says.format(TENSOR, STORAGE).encode(), **{"data/0": storage.tobytes(), "byteorder": "little"})
    if message is None:
        np.testing.assert_array_equal(Tensors(tmp_path).read("a"), storage.reshape(2, 3))
        return
    with pytest.raises(ValueError, match=message) as error:
        pickled.read_header(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_other_files(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    weights = {"a": torch.ones(300)}
    for write, message in (
        (
            lambda: torch.save(weights, path, _use_new_zipfile_serialization=False),
            "from before 1.6.* rewrite it with PyTorch",
        ),
        (lambda: path.write_bytes(pickle.dumps({"a": 1})), "truncated or damaged"),
        (lambda: (torch.save(weights, path), path.write_bytes(path.read_bytes()[:-200])), "truncated or damaged"),
        (lambda: write_zip(path, pickle.dumps({}, 2), byteorder="big"), "big-endian"),
        (lambda: path.write_bytes(b""), "truncated or damaged"),
    ):
        write()
        with pytest.raises(ValueError, match=message) as error:
            Tensors(tmp_path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
