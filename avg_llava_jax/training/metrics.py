"""Logs of a run: metrics.jsonl, TensorBoard, skipped.jsonl, and a progress line."""

import collections
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from avg_llava_jax.data.pipeline import Skipped
from avg_llava_jax.files import write_whole

METRICS, SKIPPED, TENSORBOARD = "metrics.jsonl", "skipped.jsonl", "tensorboard"
FEW = 100
"""Fewest samples on which the bound on the skipped share is checked."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none without a file. An incomplete last line is left out."""
    rows = []
    if path.is_file():
        # As bytes: a cut may go through a character, and a text's `splitlines` knows more line ends than JSON escapes.
        for line in path.read_bytes().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def _rewrite(path: Path, rows: list[dict[str, Any]]) -> TextIO:
    """Replace a JSONL file atomically by these rows, and open it to append."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return open(path, "a", encoding="utf-8", buffering=1)


class MetricsLog:
    """metrics.jsonl and TensorBoard. Rows after step `start` are dropped, because the resumed run repeats them.

    bad_steps: the number of steps up to `start` that were skipped because they were not finite.
    best: the lowest validation loss up to `start` and its step, the first of a tie; None without validation.
    """

    FLUSH = 10.0  # seconds

    def __init__(self, workdir: Path, start: int):
        kept = [row for row in read_rows(workdir / METRICS) if row["step"] <= start]
        self.bad_steps = sum("not_finite" in row for row in kept)
        measured = [(row["validation/loss"], row["step"]) for row in kept if "validation/loss" in row]
        self.best: tuple[float, int] | None = min((each for each in measured if math.isfinite(each[0])), default=None)
        self._file = _rewrite(workdir / METRICS, kept)
        (workdir / TENSORBOARD).mkdir(exist_ok=True)
        # Not by tensorboardX's SummaryWriter: its thread dies on a full disk, and the run would wait for it forever.
        self._board = EventsWriter(str(workdir / TENSORBOARD / "events"))
        session = SessionLog(status=SessionLog.START)  # makes TensorBoard drop what an earlier one has from here on
        self._board.write_event(Event(wall_time=time.time(), step=start + 1, session_log=session))
        self._flushed = time.monotonic()

    def write(self, row: dict[str, Any]) -> None:
        """Write one step: a row with `step`, and numbers or texts."""
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        numbers = {name: value for name, value in row.items() if name != "step" and isinstance(value, (int, float))}
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()])
        self._board.write_event(Event(wall_time=time.time(), step=row["step"], summary=summary))
        if time.monotonic() - self._flushed > self.FLUSH:
            self._board.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()
        self._board.close()


class SkippedLog:
    """skipped.jsonl, one row per record however often it is drawn, and the bound on the share of skipped samples.

    All processes of a run hold the same counts; the process with a `workdir` writes the file.
    """

    def __init__(self, workdir: Path | None, max_share: float):
        self._max_share = max_share
        rows = [] if workdir is None else read_rows(workdir / SKIPPED)
        self._known = {row["record"] for row in rows}
        self.reasons = collections.Counter(row["reason"] for row in rows)
        self._file = None if workdir is None else _rewrite(workdir / SKIPPED, rows)
        self._seen = self._skipped = 0

    def add(self, used: int, skipped: Sequence[Skipped]) -> None:
        """Count the used samples of a batch, and log its skipped records.

        Raises:
          RuntimeError: more than the allowed share was skipped.
        """
        self._seen += used + len(skipped)
        self._skipped += len(skipped)
        for one in map(Skipped._make, skipped):
            if one.record not in self._known:
                self._known.add(one.record)
                self.reasons[one.reason] += 1
                if self._file is not None:
                    self._file.write(json.dumps(one._asdict(), ensure_ascii=False) + "\n")
        if self._seen >= FEW and self._skipped > self._max_share * self._seen:
            raise RuntimeError(
                f"{self._skipped} of {self._seen} samples could not be used, more than data.max_skipped_share="
                f"{self._max_share} allows: {self.summary()}; {SKIPPED} says which"
            )

    def summary(self) -> str:
        """`12 missing_image, 3 empty_answer`."""
        return ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Progress:
    """A progress line, redrawn on a terminal and repeated at intervals in a file.

    label: begins each line of a run that trains next to others; these lines are never redrawn.
    """

    PATIENCE = 10.0  # seconds between lines that cannot be redrawn
    REMEMBERED = 50  # newest steps, whose median is the pace; compilation is excluded

    def __init__(self, steps: int, out: TextIO = sys.stderr, label: str = ""):
        self._steps, self._out, self._live = steps, out, out.isatty() and not label
        self._label = label and f"{label}: "
        self._last = -float("inf")
        self._seconds: collections.deque[float] = collections.deque(maxlen=self.REMEMBERED)
        self._validation = ""  # the newest

    def show(self, row: dict[str, Any]) -> None:
        """Show a row of metrics.jsonl."""
        self._seconds.append(row["step_seconds"])
        now, measured = time.monotonic(), "validation/loss" in row
        if measured:
            regret = f" regret {row['validation/regret']:.3g}" if "validation/regret" in row else ""
            best = row["validation/best_step"]
            self._validation = f"  validation {row['validation/loss']:.4f}{regret}, best at step {best}"
        if row["step"] < self._steps and not measured and now - self._last < (0.1 if self._live else self.PATIENCE):
            return
        self._last = now
        pace = sorted(self._seconds)[len(self._seconds) // 2]
        left = int(pace * (self._steps - row["step"]))
        extra = "".join(
            f"  {name} {row[key]:.3g}"
            for name, key in (("best", "best_chosen"), ("regret", "regret"), ("visual", "visual_tokens"))
            if key in row
        )
        line = (
            f"{self._label}{row['phase']} {row['step']}/{self._steps}  "
            f"loss {row['loss']:.4f}{extra}{self._validation}  "
            f"{row['tokens_per_second']:.0f} tokens/s  {pace:.2f} s/step  "
            f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        )
        self._out.write(f"\r\x1b[K{line}" if self._live else line + "\n")
        self._out.flush()

    def say(self, text: str) -> None:
        """Print a separate line, above the live one."""
        text = self._label + text
        self._out.write(f"\r\x1b[K{text}\n" if self._live else text + "\n")
        self._out.flush()

    def close(self) -> None:
        if self._live:
            self._out.write("\n")
            self._out.flush()
