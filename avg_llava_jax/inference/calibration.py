"""calibration.json in a checkpoint folder: the thresholds that `Request.escalate="calibrated"` takes.

    {"format": 2, "step": 1200, "quantize": null, "alpha": 0.01, "delta": 0.05, "questions": 672,
     "data": "held_out.json", "thresholds": {"4": 0.93, "auto": 0.87}}

A key of `thresholds` is where a request begins: tokens per tile of all its images, or auto, the router without a price.
`avg-llava calibrate` writes the file; `eval.calibration` says what it guarantees.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

from avg_llava_jax.files import write_whole

FILE, FORMAT = "calibration.json", 2  # thresholds of format 1 are of escalation straight to the finest granularity


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Fitted thresholds, see the module's docstring. questions: number of independent questions they were fitted on."""

    step: int
    quantize: str | None
    alpha: float
    delta: float
    questions: int
    data: str
    thresholds: dict[str, float]

    def write(self, folder: pathlib.Path) -> pathlib.Path:
        """Write it into a checkpoint folder; returns the file."""
        path = folder / FILE
        write_whole(path, json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=1) + "\n")
        return path


def load_calibration(folder: pathlib.Path, step: int, quantize: str | None) -> Calibration | None:
    """The calibration of a checkpoint folder at a step, None without the file.

    Raises:
      ValueError: the file is malformed, or of another step or quantization; names the file.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError("unknown format")
        found = Calibration(**values)
        if not all(0 <= float(value) <= 1 for value in found.thresholds.values()):
            raise ValueError("a threshold is not a probability")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a calibration of this version ({error}): calibrate again") from None
    if (found.step, found.quantize) != (step, quantize):
        raise ValueError(
            f"{path} is of step {found.step} with quantize={found.quantize}, the model is of step {step} with "
            f"quantize={quantize}: calibrate again"
        )
    return found
