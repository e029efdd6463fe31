"""Accuracy of LoRA beside full tuning: python -m launch.bench.lora --workdir=DIR

Tunes two bases on two data sets, in full and with adapters of rank 8, and asks held-out questions at the same
granularity. Language model and connector are trained; the encoder, whose features the shipped model needs as they are,
stays frozen in both. Writes the table of docs/lora.md.

    the shipped model                    4 decoder layers
    the shipped model, expanded          30 decoder layers: each is followed by copies of itself whose last products are
                                         zero, so that it computes what it did (Wu et al., "LLaMA Pro", 2024)

    jersey      with questions about neighbours, which the shipped model was not trained to answer
    digits      of `data_sets`; pip install scikit-learn

After an interruption the same command resumes; DIR/outcome.json holds what was measured.
"""

import json
import pathlib
import time
from typing import Any

from absl import flags

from avg_llava_jax.commands import cli
from launch.bench import data_sets

WORKDIR = flags.DEFINE_string("workdir", None, "Where bases, data, runs and outcome.json go.")
STEPS = flags.DEFINE_integer("steps", 480, "Steps of each run; half of them with 30 layers.", lower_bound=2)
QUESTIONS = flags.DEFINE_integer("questions", 400, "Held-out questions of jersey, and pictures of digits, two each.", 1)

GRANULARITY, BATCH, LAYERS = 16, 8, 30
BASES = {"shipped": "shipped, 4 layers", "expanded": "expanded, 30 layers"}
DATA = ("jersey", "digits")
METHODS = {
    "full": {"optimizer.learning_rate": 1e-3},
    "lora": {
        "optimizer.learning_rate": 5e-3,
        "optimizer.connector_learning_rate": 1e-3,
        "optimizer.lora.rank": 8,
    },
}
"""Settings of a run; adapters want a higher rate than full tuning, the connector beside them does not."""

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "lora.md"
BEGIN, END = "<!-- accuracy: python -m launch.bench.lora -->\n", "<!-- end of accuracy -->\n"


def expand(folder: pathlib.Path) -> None:
    """Write the shipped model with `LAYERS` decoder layers that compute what its 4 do."""
    import dataclasses

    import jax.numpy as jnp
    import numpy as np

    from avg_llava_jax import SHIPPED, checkpoint, parameters
    from avg_llava_jax.convert import convert

    loaded = checkpoint.load(SHIPPED)
    few = loaded.config.language.layers
    source = np.sort(np.arange(LAYERS) % few)
    own = jnp.array(np.diff(source, prepend=-1) > 0)
    leaves = parameters.flat(loaded.params)
    for path in [path for path in leaves if path.startswith("language/layers/")]:
        leaf = leaves[path][source]
        last = path.endswith(("/out/kernel", "/down/kernel"))
        leaves[path] = leaf * own.reshape(-1, *[1] * (leaf.ndim - 1)) if last else leaf
    language = dataclasses.replace(loaded.config.language, layers=LAYERS)
    config = dataclasses.replace(loaded.config, language=language)
    convert.write_checkpoint(loaded._replace(config=config, params=parameters.unflat(leaves)), folder)


def data_of(name: str, root: pathlib.Path, split: str) -> tuple[str, str]:
    """The path and the images of a data set; questions of a test come one at a time."""
    if name == "jersey":
        settings = {"train": "turns=4", "test": f"turns=1&split=test&size={QUESTIONS.value}"}[split]
        return f"jersey?near=0.7&coarse=0.2&neighbours=3&{settings}", ""
    return str(root / name / f"{split}.json"), str(root / name)


def accuracy(checkpoint: pathlib.Path, path: str, images: str) -> float:
    """Share of questions that are answered as their records do."""
    from avg_llava_jax.data.sources import open_source
    from avg_llava_jax.eval.evaluation import normalise, read_questions
    from avg_llava_jax.inference.api import AvgLlava
    from avg_llava_jax.inference.requests import Request

    model = AvgLlava.load(checkpoint)
    questions, _ = read_questions(open_source(path, images), model.tokenizer, model.config)
    request = Request("", max_new_tokens=12)
    prepared = [question.asked(request, (GRANULARITY,)) for question in questions]
    answers = model.answer_prepared(prepared, 32)
    right = [normalise(a.text) == normalise(q.reference) for a, q in zip(answers, questions, strict=True)]
    return sum(right) / len(right)


def run(root: pathlib.Path, base: str, data: str, method: str) -> dict[str, Any]:
    """Tune a base on a data set, or take it as it is (`base`); returns accuracy and seconds of training."""
    from avg_llava_jax import SHIPPED
    from avg_llava_jax.training.config import defaults
    from avg_llava_jax.training.loop import train

    start = SHIPPED if base == "shipped" else root / base
    test = data_of(data, root, "test")
    if method == "base":
        return {"accuracy": accuracy(start, *test)}
    config = defaults()
    config.init_from, config.granularities = str(start), (GRANULARITY,)
    config.data.path, config.data.images = data_of(data, root, "train")
    config.steps = STEPS.value if base == "shipped" else STEPS.value // 2
    config.batch_size, config.checkpoint_every, config.data.shapes = BATCH, 40, 1
    if method == "full":
        config.optimizer.encoder_learning_rate = 0.0
    config.update_from_flattened_dict(METHODS[method])
    workdir, begin = root / f"{base}-{data}-{method}", time.perf_counter()
    train(config, workdir)
    seconds = time.perf_counter() - begin
    return {"accuracy": accuracy(workdir, *test), "seconds": seconds, "steps": config.steps}


def table(found: dict[str, Any]) -> str:
    """The table in Markdown; a row that is not measured is missing."""
    rows = ["| base | data | steps | untuned | full | LoRA, rank 8 | difference |", "|---|---|" + "---:|" * 5]
    for base, title in BASES.items():
        for data in DATA:
            each = [found.get(f"{base} {data} {method}") for method in ("base", *METHODS)]
            if all(each):
                before, full, lora = (one["accuracy"] for one in each)
                shown = f"{before:.3f} | {full:.3f} | {lora:.3f} | {lora - full:+.3f}"
                rows.append(f"| {title} | {data} | {each[1]['steps']} | {shown} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    from avg_llava_jax.files import around, write_whole

    root = pathlib.Path(WORKDIR.value)
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "expanded").exists():
        expand(root / "expanded")
    data_sets.write("digits", root / "digits", 2000, QUESTIONS.value)
    file = root / "outcome.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for key in [f"{base} {data} {method}" for base in BASES for data in DATA for method in ("base", *METHODS)]:
        if key not in found:
            found[key] = run(root, *key.split())
            write_whole(file, json.dumps(found, indent=1) + "\n")
            print(key, found[key], flush=True)
            before, after = around(DOCUMENT, BEGIN, END)
            write_whole(DOCUMENT, before + table(found) + after)


if __name__ == "__main__":
    cli.run(main, required=["workdir"], model_flags=())
