"""Stored feedback: the frozen model's NLL for each answer, and optionally its image features, on disk.

    FOLDER/feedback.json          format, granularities, dtype of the features ("" = none), `measured_by` (digests of
                                  weights, model config and code), and, once the set is complete, its files
    FOLDER/00003-0.npz            window 3 of the pipeline, process 0: for each sample `asked`, a digest, `records`,
                                  `path#number`, `nll` (G,) with NaN where there is no answer, and `tiles`
    FOLDER/00003-0.features.npy   (tiles of all samples, P, D), memory-mapped by the reader

`asked` identifies an answer, by `question_digest` of token ids, labels and encoded images. Neither the sample's id nor
its position matters, so records whose ids repeat, are missing or null keep their own answers, and the data may move. A
sample that changed is not found. A window's files appear only when complete, the features first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  adds bfloat16 to NumPy's dtypes
import numpy as np

from avg_llava_jax.data.packing import Sample
from avg_llava_jax.files import differing, write_whole

ABOUT = "feedback.json"
FORMAT = 2
"""1 found answers by sample id."""


class Stored(NamedTuple):
    """Feedback of one sample: mean NLL of its answer in nats (G,), tile features (T, P, D) or None, and its record."""

    nll: np.ndarray
    features: np.ndarray | None
    record: str

    @property
    def answered(self) -> bool:
        """Whether there is an answer at every granularity; not if an image could not be decoded."""
        return bool(np.isfinite(self.nll).all())


def question_digest(sample: Sample) -> str:
    """Digest of what a sample asks the frozen model: its token ids, labels and encoded images, in hex.

    Raises:
      BadSample: an image is missing.
    """
    found = hashlib.sha256()
    for values in (sample.tokens.ids, sample.tokens.labels):
        found.update(np.asarray(values, np.int64).tobytes() + b"/")
    for image in sample.images:
        found.update(image.digest())
    return found.hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class FeedbackFolder:
    """Writes one set of stored feedback.

    granularities: of the model, ascending. features: dtype of the stored features, "" = none are stored.
    measured_by: digests of what determines the answers, by name: {"weights": ..., "model config": ..., "code": ...}.
    """

    path: Path
    granularities: tuple[int, ...]
    features: str = ""
    measured_by: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def start(self) -> None:
        """Create the folder, or resume it.

        Raises:
          ValueError: the folder holds a set of other granularities, features, weights, model config or code.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        about = self.path / ABOUT
        if about.exists():
            self._expect(_read_about(self.path))
        else:
            write_whole(about, json.dumps(self._about()) + "\n")

    def holds(self, window: int, process: int) -> dict[str, str]:
        """Samples of a stored window: {digest of what was asked: record}; empty if it is missing or damaged."""
        try:
            with np.load(self._answers(window, process)) as stored:
                return dict(zip(stored["asked"].tolist(), stored["records"].tolist(), strict=True))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return {}

    def add(self, window: int, process: int, stored: Mapping[str, Stored]) -> None:
        """Store the feedback of a window, by digest of what was asked."""
        rows = list(stored.values())
        tiles = np.array([0 if row.features is None else len(row.features) for row in rows], np.int32)
        if self.features and len(rows):
            # As bytes, since NumPy's format does not know bfloat16.
            raw = np.concatenate([row.features for row in rows]).view(np.uint8)
            write_whole(self._features(window, process), lambda file: np.save(file, raw))
        arrays = {
            "asked": np.array(list(stored), np.str_),
            "records": np.array([row.record for row in rows], np.str_),
            "nll": np.array([row.nll for row in rows], np.float32).reshape(len(rows), len(self.granularities)),
            "tiles": tiles,
        }
        write_whole(self._answers(window, process), lambda file: np.savez(file, **arrays))

    def finish(self, windows: int, processes: int) -> None:
        """Mark the set complete."""
        files = [self._answers(window, process).name for window in range(windows) for process in range(processes)]
        write_whole(self.path / ABOUT, json.dumps(self._about() | {"files": files}) + "\n")

    def _about(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "granularities": self.granularities,
            "features": self.features,
            "measured_by": dict(self.measured_by),
        }

    def _expect(self, about: dict[str, Any]) -> None:
        if tuple(about["granularities"]) != self.granularities:
            ladder = tuple(about["granularities"])
            raise ValueError(f"{self.path} is on granularities {ladder}, the model has {self.granularities}")
        if about["features"] != self.features:
            before = about["features"] or "none"
            raise ValueError(
                f"{self.path} was started with features {before}, not {self.features or 'none'}: give another folder"
            )
        require_same_measure(self.path, self.measured_by)

    def _answers(self, window: int, process: int) -> Path:
        return self.path / f"{window:05}-{process}.npz"

    def _features(self, window: int, process: int) -> Path:
        return self.path / f"{window:05}-{process}.features.npy"


def read_feedback(path: str | os.PathLike[str], granularities: Sequence[int]) -> dict[str, Stored]:
    """Reads a complete set: {digest of what was asked: Stored}, with NLLs at `granularities`, in their order.

    Features are memory-mapped.

    Raises:
      FileNotFoundError: the folder holds no set.
      ValueError: the set is incomplete, empty or damaged, has another format, or lacks a granularity.
    """
    path = Path(path)
    about = _read_about(path)
    ladder = about["granularities"]
    if not set(granularities) <= set(ladder):
        raise ValueError(f"{path} is on granularities {tuple(ladder)}, the model has {tuple(granularities)}")
    columns = [ladder.index(granularity) for granularity in granularities]
    if "files" not in about:
        raise ValueError(f"rglf.feedback={path} is incomplete: run avg-llava feedback again to resume it")
    found: dict[str, Stored] = {}
    for name in about["files"]:
        try:
            with np.load(path / name) as stored:
                digests, records = stored["asked"].tolist(), stored["records"].tolist()
                nll, tiles = stored["nll"][:, columns], stored["tiles"]
            features = None
            if about["features"] and digests:
                raw = np.load(path / name.replace(".npz", ".features.npy"), mmap_mode="r")
                features = raw.view(np.dtype(about["features"]))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path / name} cannot be read ({error}): delete it, run avg-llava feedback again"
            ) from None
        ends = np.cumsum(tiles)
        for row, (digest, end, count) in enumerate(zip(digests, ends, tiles, strict=True)):
            kept = None if features is None else features[end - count : end]
            found[digest] = Stored(nll[row], kept, records[row])
    if not any(stored.answered for stored in found.values()):
        raise ValueError(f"rglf.feedback={path} holds no answers: check data.path and run avg-llava feedback again")
    return found


def require_same_measure(path: str | os.PathLike[str], measured_by: Mapping[str, str]) -> None:
    """Checks that a set was measured with these weights, this model config and this code.

    Raises:
      ValueError: it was not; names which of them differ.
    """
    before = _read_about(Path(path))["measured_by"]
    if other := differing(before, measured_by):
        raise ValueError(f"{path} was measured with other {other}: let avg-llava feedback measure into another folder")


def _read_about(path: Path) -> dict[str, Any]:
    if not (path / ABOUT).is_file():
        raise FileNotFoundError(f"rglf.feedback={path} has no {ABOUT}: make it with avg-llava feedback")
    about = json.loads((path / ABOUT).read_text())
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} is of an earlier format: let avg-llava feedback measure into another folder")
    return about
