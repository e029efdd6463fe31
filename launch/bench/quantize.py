"""Effect of int8 weights: python -m launch.bench.quantize --output=quantize.json

Compares a checkpoint before and after quantization: bytes, scores of the first answer token, router scores, and
accuracy at every granularity; and prints the bytes of AVG-LLaVA's language model in bfloat16 for reference.
"""

import json
from typing import Any

from absl import flags

from avg_llava_jax.commands import cli

DATA = flags.DEFINE_string(
    "data", "jersey?split=test&size=512&paired=true", "Questions: a LLaVA JSON, JSONL or jersey."
)
IMAGES = flags.DEFINE_string("images", "", "Where their images lie: a folder, a .zip or a .tar.")
SCORED = flags.DEFINE_integer("scored", 32, "Questions whose first token's scores are compared.", lower_bound=1)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 16, "Longest answer.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "Where the JSON goes.")


def scores(models: dict[str, Any], questions: Any) -> dict[str, float]:
    """How far int8 changes the scores of the first answer token, over all granularities of all questions."""
    import numpy as np

    from avg_llava_jax.eval import explain
    from avg_llava_jax.inference.requests import Request

    moved, spread, divergence, same, routed = [], [], [], [], []
    for question in questions:
        request = Request(question.text, question.sample.images)
        one, other = (explain.explain(model, request) for model in models.values())
        routed.append(np.array_equal(one.router_choice, other.router_choice))
        for name in one.config.granularities:
            before, after = one.logits[name].astype(np.float64), other.logits[name].astype(np.float64)
            logs = [row - row.max() - np.log(np.exp(row - row.max()).sum()) for row in (before, after)]
            moved.append(np.abs(after - before).max())
            spread.append(before.std())
            divergence.append(np.sum(np.exp(logs[0]) * (logs[0] - logs[1])))
            same.append(before.argmax() == after.argmax())
    return {
        "largest_change": float(np.max(moved)),
        "mean_largest_change": float(np.mean(moved)),
        "standard_deviation_of_logits": float(np.mean(spread)),
        "mean_kl_nats": float(np.mean(divergence)),
        "same_first_token": float(np.mean(same)),
        "same_granularity_chosen": float(np.mean(routed)),
    }


def main() -> None:
    import jax

    from avg_llava_jax import parameters
    from avg_llava_jax.config import ModelConfig
    from avg_llava_jax.convert.quantize import memory, quantized
    from avg_llava_jax.data.sources import open_source
    from avg_llava_jax.eval import evaluation, policies
    from avg_llava_jax.files import write_whole
    from avg_llava_jax.inference.api import AvgLlava

    source = open_source(DATA.value, IMAGES.value)
    plain = AvgLlava.load(cli.CHECKPOINT.value, cli.VISION_TOWER.value, dtype=cli.DTYPE.value)
    models = {"plain": plain, "int8": AvgLlava(plain.config, quantized(plain.params), plain.tokenizer)}
    questions, _ = evaluation.read_questions(source, plain.tokenizer, plain.config)
    report: dict[str, Any] = {"n": len(questions), "bytes": {}, "accuracy": {}}
    for name, model in models.items():
        records = evaluation.answer_all(model, questions, max_new_tokens=MAX_NEW_TOKENS.value, skipped=[])
        accuracy = policies.report(model.config, records)["accuracy"]
        report["accuracy"][name] = {g: each["all"] for g, each in accuracy["fixed"].items()}
        report["accuracy"][name]["adaptive"] = accuracy["adaptive"]["all"]
        report["bytes"][name] = memory(model.params)
    whole = parameters.abstract(ModelConfig(), "bfloat16")
    for name, shapes in (("plain", whole), ("int8", jax.eval_shape(quantized, whole))):
        report["bytes"][name]["7B language"] = memory(shapes)["language"]
    asked = [question for question in questions if question.sample.sizes][: SCORED.value]
    report["scores"] = scores(models, asked)
    if OUTPUT.value:
        write_whole(OUTPUT.value, json.dumps(report, indent=1) + "\n")

    print(f"{'':<12}{'plain':>12}{'int8':>12}")
    for key, scale, form in (("bytes", 2**20, ">12.2f"), ("accuracy", 1, ">12.4f")):
        for part in report[key]["plain"]:
            values = "".join(f"{report[key][name][part] / scale:{form}}" for name in models)
            print(f"{part:<12}{values}" + (" MiB" if key == "bytes" else " accuracy"))
    for what, value in report["scores"].items():
        print(f"{what.replace('_', ' ')}: {value:.4g}")


if __name__ == "__main__":
    cli.run(main, required=[], model_flags=cli.STORED_FLAGS)
