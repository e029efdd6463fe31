"""Score any model's answers on one of the paper's benchmarks, without loading a model.

    avg-llava score --task=textvqa_val --data=DIR --answers=answers.jsonl --output=score.json

The input is lines `{"index": row of the split, "answer": text}`, the output `{"task", "n", "missing", "metrics"}` with
metrics named and computed as in lmms-eval. A row without a line counts as wrong.
"""

import json
import pathlib

from absl import flags

from avg_llava_jax.commands import cli

TASK = flags.DEFINE_string("task", None, "The benchmark, by lmms-eval's name: gqa, scienceqa_img, textvqa_val, ...")
DATA = flags.DEFINE_string("data", None, "Its folder as downloaded (parquet or original), or its id on the hub.")
ANSWERS = flags.DEFINE_string("answers", None, "JSON lines with `index` and `answer`.")
OUTPUT = flags.DEFINE_string("output", None, "The JSON file to write.")


def main() -> None:
    from avg_llava_jax.eval.benchmarks import records, scoring, tasks
    from avg_llava_jax.files import write_whole

    output = pathlib.Path(OUTPUT.value)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output={output}: its folder does not exist")
    task = tasks.find(TASK.value)
    rows = records.read(task, DATA.value, images=False)
    result = scoring.score(task, rows, scoring.read_answers(ANSWERS.value, len(rows)))
    write_whole(output, json.dumps(result, indent=1) + "\n")
    print(f"{task.title}: {result['n']} questions, {result['missing']} without an answer")
    for name, value in result["metrics"].items():
        print(f"  {name:<24}{value:>12.4f}")


def command() -> None:
    cli.run(main, required=["task", "data", "answers", "output"], model_flags=())
