"""Stored feedback: how well the frozen model answered each sample, and what it saw, on disk.

    FOLDER/feedback.json          granularities, dtype of the features ("" = none), files of a whole set
    FOLDER/00003-0.npz            window 3 of the pipeline, process 0: `ids` (N,), `nll` (N, G), `tiles` (N,)
    FOLDER/00003-0.features.npy   (tiles of all samples, P, D), mapped into memory when it is read

A window's files appear only when whole, the features first; those that are there are not measured again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401  adds bfloat16 to NumPy's dtypes
import numpy as np

from avg_llava_jax.files import write_whole

ABOUT = "feedback.json"


class Stored(NamedTuple):
    """Of one sample: mean NLL of its answer in nats (G,), and its tiles' features (T, P, D), None = not kept."""

    nll: np.ndarray
    features: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class FeedbackFolder:
    """A set that is being written or read.

    granularities: of the model, ascending. features: dtype they are kept in, "" = they are not kept.
    """

    path: Path
    granularities: tuple[int, ...]
    features: str = ""

    def begin(self) -> None:
        """Make the folder, or go on with one.

        Raises:
          ValueError: what is there was measured in another way.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        about = self.path / ABOUT
        if about.exists():
            _expect(self.path, _read_about(self.path), self.granularities, self.features)
        else:
            write_whole(about, json.dumps({"granularities": self.granularities, "features": self.features}) + "\n")

    def has(self, window: int, process: int) -> bool:
        """Whether the answers of a window are stored."""
        return self._answers(window, process).exists()

    def add(self, window: int, process: int, stored: Mapping[str, Stored]) -> None:
        """Store the answers of a window."""
        rows = list(stored.values())
        tiles = np.array([0 if row.features is None else len(row.features) for row in rows], np.int32)
        if self.features and len(rows):
            # As bytes, since NumPy's format does not know bfloat16.
            raw = np.concatenate([row.features for row in rows]).view(np.uint8)
            write_whole(self._features(window, process), lambda file: np.save(file, raw))
        nll = np.array([row.nll for row in rows], np.float32).reshape(len(rows), len(self.granularities))
        arrays = {"ids": np.array(list(stored), np.str_), "nll": nll, "tiles": tiles}
        write_whole(self._answers(window, process), lambda file: np.savez(file, **arrays))

    def finish(self, windows: int, processes: int) -> None:
        """Note that the set is whole."""
        files = [self._answers(window, process).name for window in range(windows) for process in range(processes)]
        about = {"granularities": self.granularities, "features": self.features, "files": files}
        write_whole(self.path / ABOUT, json.dumps(about) + "\n")

    def ids(self, window: int, process: int) -> list[str]:
        """Of the samples of a stored window."""
        with np.load(self._answers(window, process)) as stored:
            return stored["ids"].tolist()

    def _answers(self, window: int, process: int) -> Path:
        return self.path / f"{window:05}-{process}.npz"

    def _features(self, window: int, process: int) -> Path:
        return self.path / f"{window:05}-{process}.features.npy"


def read_feedback(path: str | os.PathLike[str], granularities: Sequence[int]) -> dict[str, Stored]:
    """A whole set by sample id, of some of its granularities; the features stay on disk until they are looked at.

    Raises:
      FileNotFoundError, ValueError: there is none, it is not whole, or it lacks a granularity.
    """
    path = Path(path)
    about = _read_about(path)
    ladder = about["granularities"]
    if not set(granularities) <= set(ladder):
        raise ValueError(f"{path} is on granularities {tuple(ladder)}, the model has {tuple(granularities)}")
    columns = [ladder.index(granularity) for granularity in granularities]
    if "files" not in about:
        raise ValueError(f"rglf.feedback={path} is not whole: run launch.feedback again, it goes on where it was")
    found: dict[str, Stored] = {}
    for name in about["files"]:
        try:
            with np.load(path / name) as stored:
                ids, nll, tiles = stored["ids"].tolist(), stored["nll"][:, columns], stored["tiles"]
            features = None
            if about["features"] and ids:
                raw = np.load(path / name.replace(".npz", ".features.npy"), mmap_mode="r")
                features = raw.view(np.dtype(about["features"]))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path / name} cannot be read ({error}): delete it, run launch.feedback again") from None
        ends = np.cumsum(tiles)
        for row, (sample, end, count) in enumerate(zip(ids, ends, tiles, strict=True)):
            found[sample] = Stored(nll[row], None if features is None else features[end - count : end])
    return found


def _read_about(path: Path) -> dict[str, object]:
    if not (path / ABOUT).is_file():
        raise FileNotFoundError(f"rglf.feedback={path} has no {ABOUT}: make it with launch.feedback")
    return json.loads((path / ABOUT).read_text())


def _expect(path: Path, about: dict[str, object], granularities: Sequence[int], features: str) -> None:
    if tuple(about["granularities"]) != tuple(granularities):
        ladder = tuple(about["granularities"])
        raise ValueError(f"{path} is on granularities {ladder}, the model has {tuple(granularities)}")
    if about["features"] != features:
        began = about["features"] or "none"
        raise ValueError(f"{path} was begun with features {began}, not {features or 'none'}: give another folder")
