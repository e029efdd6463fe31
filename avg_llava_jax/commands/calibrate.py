"""Fit the thresholds of --escalate=calibrated on held-out questions, with a guarantee.

    avg-llava calibrate --checkpoint=W --data=held_out.json --images=DIR --workdir=OUT --alpha=0.01 --delta=0.05

With confidence 1 - delta, at most a share alpha of questions like these is answered worse with --escalate=calibrated
than at the finest granularity, whatever their distribution. The thresholds, one for each --begin, are written to
W/calibration.json. The questions must not have been trained on; of each picture, one counts. Their answers are kept in
OUT, as those of `avg-llava evaluate`.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from avg_llava_jax.commands import cli, evaluate

ALPHA = flags.DEFINE_float("alpha", 0.01, "The largest share of questions that may be answered worse.", 1e-6, 0.999999)
DELTA = flags.DEFINE_float("delta", 0.05, "The probability that the share is larger.", 1e-12, 0.999999)
BEGIN = flags.DEFINE_list("begin", None, "Where answers begin: tokens per tile, auto. Default: the coarsest and auto.")
flags.adopt_module_key_flags(evaluate)


def places(ladder: Sequence[Any], records: Sequence[Mapping[str, Any]], begin: str) -> list[int]:
    """The place in the ladder where each question begins. begin: tokens per tile, or auto.

    Raises:
      ValueError: the router chose different granularities for the images of one question, whose further passes were
        not measured.
    """
    named = [str(g) for g in ladder]
    if begin != "auto":
        return [named.index(begin)] * len(records)
    chosen = [{str(g) for g in record["chosen"]} for record in records]
    mixed = sum(len(each) > 1 for each in chosen)
    if mixed:
        raise ValueError(
            f"--begin=auto: the router chose different granularities for the images of {mixed} questions, so what "
            f"follows was not measured: calibrate with --begin={named[0]}, or on questions about one image"
        )
    return [named.index(each.pop()) for each in chosen]


def main() -> None:
    import numpy as np

    from avg_llava_jax.eval import calibration, escalation
    from avg_llava_jax.inference.calibration import Calibration

    model = cli.load_model()
    *coarse, finest = [str(g) for g in model.config.granularities]
    begins = list(dict.fromkeys(BEGIN.value or [*coarse[:1], "auto"]))
    for begin in begins:
        if begin not in (*coarse, "auto"):
            raise ValueError(f"--begin={begin}: choose {', '.join(coarse)}, auto")
    _, answered, _ = evaluate.answered(model)
    seen = [record for record in answered if record["images"]]
    rows = calibration.one_of_each([tuple(record["images"]) for record in seen], evaluate.SEED.value)
    records = [seen[row] for row in rows]
    print(f"{len(answered)} questions, {len(records)} of them independent")
    delta = DELTA.value / len(begins)  # each threshold takes a part of it, so that all hold together
    print(f"alpha={ALPHA.value:g}, delta={delta:g} each: {calibration.questions_needed(ALPHA.value, delta)} are needed")

    table = escalation.table(model.config, records)
    costs = escalation.token_costs(table)
    fine = table.right[np.arange(len(records)), table.finest]
    thresholds = {}
    for begin in begins:
        first = np.array(places(model.config.granularities, records, begin))
        kept = functools.partial(escalation.escalated, table, first, costs=costs)
        threshold = calibration.fit(lambda t, kept=kept: kept(t).right < fine, ALPHA.value, delta)
        found = kept(threshold)
        thresholds[begin] = threshold
        print(
            f"{begin:>6}: escalate={threshold:.6f}, {(found.last != first).mean():.1%} escalate, "
            f"accuracy {found.right.mean():.4f}, always {finest} {fine.mean():.4f}"
        )
    found = Calibration(
        step=model.step,
        quantize=cli.QUANTIZE.value,
        alpha=ALPHA.value,
        delta=DELTA.value,
        questions=len(records),
        data=evaluate.DATA.value,
        thresholds=thresholds,
    )
    print(found.write(pathlib.Path(cli.CHECKPOINT.value)))


def command() -> None:
    cli.run(main, required=["data", "workdir"])
