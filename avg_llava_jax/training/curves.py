"""Training curves of a run as a figure."""

import math
from pathlib import Path

from matplotlib.figure import Figure

from avg_llava_jax.training.metrics import METRICS, read_rows

PLOTS = "plots"
PREFIX = "validation/"
"""The prefix of metrics of held-out samples."""


def training_curves(workdir: str | Path) -> Path | None:
    """Plot metrics.jsonl: the loss, the NLL at each granularity, and the router's choices where one was trained.

    Metrics of held-out samples are dashed, in the colour of the same metric of the training batches.

    Returns the path of `plots/training.png` in the workdir, None if nothing was logged.
    """
    rows = read_rows(Path(workdir) / METRICS)
    if not rows:
        return None
    panels = [("loss (nats)", ["loss", "rank_loss", "ce_loss"]), ("answer NLL (nats/token)", _named(rows, "nll/"))]
    if any("best_chosen" in row for row in rows):
        panels += [
            ("share of images", ["best_chosen", *_named(rows, "chosen/")]),
            ("regret (nats)", ["regret"]),
            ("visual tokens", ["visual_tokens"]),
        ]
    figure = Figure(figsize=(4.6 * len(panels), 3.4), layout="constrained")  # not pyplot's, which is for one thread
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, names) in zip(axes[0], panels, strict=True):
        for name in names:
            colour = None
            for measured in (name, PREFIX + name):
                points = [(row["step"], row[measured]) for row in rows if measured in row]
                if points:
                    steps, values = zip(*points, strict=True)
                    if measured == name:
                        (line,) = axis.plot(steps, _smooth(values), label=name, linewidth=1.2)
                        colour = line.get_color()
                    else:
                        axis.plot(steps, values, "--o", label=measured, color=colour, linewidth=1.0, markersize=2.5)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(f"{rows[-1]['phase']}, {rows[-1]['step']} steps")
    path = Path(workdir) / PLOTS / "training.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _named(rows: list[dict], prefix: str) -> list[str]:
    """The metrics `prefix/<granularity>`, in ascending order."""
    names = {name for row in rows for name in row if name.startswith(prefix)}
    return sorted(names, key=lambda name: math.prod(map(int, name.removeprefix(prefix).split("x"))))


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Mean of the last few values, about a fortieth of the curve."""
    width = max(1, len(values) // 40)
    parts = (values[max(0, at - width + 1) : at + 1] for at in range(len(values)))
    return [sum(part) / len(part) for part in parts]
