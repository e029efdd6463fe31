"""Rewrite the tables of docs/scale.md: python -m launch.bench.scale_table [--base=onevision]

The tables hold the figures of `avg-llava plan` for the 7B, both phases and answering, or for LLaVA-OneVision, on
several topologies, and where a step does not fit also the settings tried until one fits. Each line takes minutes; it is
kept in --workdir and written to the document at once, and an interrupted run resumes; lines of other code or another
jax are not reused.
"""

import dataclasses
import importlib
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from avg_llava_jax import reuse
from avg_llava_jax.commands import cli

if TYPE_CHECKING:
    from avg_llava_jax.commands.planning import Plan

DOCUMENT = flags.DEFINE_string("document", "docs/scale.md", "Where the tables stand.")
WORKDIR = flags.DEFINE_string("workdir", "workdirs/scale_table", "Keeps what is known already.")
BASE = flags.DEFINE_enum("base", "avg_llava", ["avg_llava", "onevision"], "Whose tables.")
MARKS = {
    "avg_llava": ("<!-- plans: python -m launch.bench.scale_table -->\n", "<!-- end of plans -->\n"),
    "onevision": (
        "<!-- plans of LLaVA-OneVision: python -m launch.bench.scale_table --base=onevision -->\n",
        "<!-- end of plans of LLaVA-OneVision -->\n",
    ),
}
LEFT_OUT = ("target", "moves")
SHOWN = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute")

TRAINING = [
    ("avg_llava_7b_router", "v5e:8x8", {}),
    ("avg_llava_7b_router", "v6e:4x4", {}),
    ("avg_llava_7b_router", "v6e:4x4", {"optimizer.accumulate": 4}),
    ("avg_llava_7b_router", "v5p:2x2x4", {}),
    ("avg_llava_7b", "v5e:8x8", {}),
    ("avg_llava_7b", "v5e:8x8", {"optimizer.accumulate": 2}),
    ("avg_llava_7b", "v6e:4x4", {"optimizer.accumulate": 2}),
    ("avg_llava_7b", "v5p:2x2x4", {}),
    ("avg_llava_7b", "v5p:2x2x4", {"optimizer.accumulate": 2}),
]
"""Config, topology, and overrides of the config."""

ONEVISION = [
    *(("onevision_05b", topology, {}) for topology in ("h100:1", "a100-80:1", "rtx4090:1")),
    *(
        (name, topology, {"optimizer.accumulate": 8})
        for name in ("onevision_05b", "onevision_05b_router")
        for topology in ("v5e:2x2", "v6e:2x2", "v5p:2x2x1")
    ),
    *(("onevision_05b_router", topology, {}) for topology in ("h100:1", "a100-80:1", "rtx4090:1")),
    *(("onevision_7b", topology, {}) for topology in ("v5e:8x8", "v6e:4x4", "v5p:2x2x4", "h100:8", "a100-80:8")),
]
"""The same for LLaVA-OneVision."""

TEXTS = {
    "onevision_05b": (896, 4864, 24, 14, 2, 152000, True),
    "onevision_7b": (3584, 18944, 28, 28, 4, 152128, False),
}
TEXTS["onevision_05b_router"] = TEXTS["onevision_05b"]
"""Of the published decoders: width, MLP width, layers, heads, key and value heads, vocabulary, whether it is tied."""

ANSWERING = [
    ("v5e:2x2", {"batch_size": 8, "mesh.fsdp": 1, "mesh.tensor": 4}),
    ("v6e:2x2", {"batch_size": 8, "mesh.fsdp": 1, "mesh.tensor": 4}),
    ("v5p:2x2x1", {"batch_size": 8, "mesh.fsdp": 1, "mesh.tensor": 4}),
]
"""Topology and settings."""


def known(label: str, function: "Callable[..., Plan | Iterator[Plan]]", *arguments: Any) -> list[dict[str, Any]]:
    """The figures of one or several plans, from --workdir, or computed and then kept there."""
    from avg_llava_jax.files import write_whole

    name = "".join(c if c.isalnum() else "-" for c in label)
    file = pathlib.Path(WORKDIR.value) / reuse.programs(__file__) / f"{name}.json"
    if file.is_file():
        print(f"{label}: known, from the same code", file=sys.stderr, flush=True)
        return json.loads(file.read_text(encoding="utf-8"))
    print(f"{time.strftime('%H:%M:%S')} {label}", file=sys.stderr, flush=True)
    begin, found = time.monotonic(), []
    plans = function(*arguments)
    for plan in [plans] if dataclasses.is_dataclass(plans) else plans:
        values = {
            field.name: getattr(plan, field.name) for field in dataclasses.fields(plan) if field.name not in LEFT_OUT
        }
        sent = {kind: each.sent for kind, each in plan.traffic.items()}
        found.append(values | {"traffic": sent, "fits": plan.fits, "seconds": plan.seconds})
    print(f"  took {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(found, indent=1) + "\n")
    return found


def cells(plan: dict[str, Any], name: str) -> str:
    """One line of a table."""
    gib = 2**30
    kinds = ("trained", "frozen", "optimizer") if "trained" in plan["held"] else ("parameters", "cache")
    temporaries = plan["temporaries"]
    numbers = [
        name,
        *(f"{plan['held'].get(kind, 0) / gib:.2f}" for kind in kinds),
        "–" if temporaries is None else f"{temporaries / gib:.2f}",
        ("more" if plan["total"] is None else f"{plan['total'] / gib:.2f}") + ("" if plan["fits"] else " **no**"),
        f"{plan['flops'] / 1e12:.1f}",
        f"{plan['recomputed'] / plan['flops']:.0%}",
        *(f"{plan['traffic'].get(kind, 0.0) / 1e9:.1f}" for kind in SHOWN),
        *(f"{plan['seconds'][kind] * 1e3:.1f}" for kind in ("compute", "network", "memory")),
    ]
    return "| " + " | ".join(numbers) + " |\n"


def head(*first: str) -> str:
    names = [*first, "temporaries", "in all", "TFLOP", "again", *SHOWN, "compute ms", "network ms", "memory ms"]
    return "| " + " | ".join(names) + " |\n|" + "---|" * len(names) + "\n"


def config_of(name: str, settings: dict[str, Any]) -> Any:
    config = importlib.import_module(f"avg_llava_jax.configs.{name}").get_config()
    config.update_from_flattened_dict(settings)
    return config


def onevision(name: str) -> str:
    """A folder with all that a plan reads of the published LLaVA-OneVision that config `name` starts from."""
    from avg_llava_jax import ASSETS
    from avg_llava_jax.files import write_json

    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "vocab_size", "tie_word_embeddings")  # fmt: skip
    text = dict(zip(fields, TEXTS[name], strict=True)) | {"model_type": "qwen2", "rope_theta": 1e6}
    folder = pathlib.Path(WORKDIR.value) / name
    shutil.copytree(ASSETS / "tokenizer", folder, dirs_exist_ok=True)
    write_json(folder / "config.json", {"model_type": "llava_onevision", "text_config": text})
    write_json(folder / "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3})
    return str(folder)


def rows() -> Iterator[str]:
    if BASE.value == "onevision":
        yield from steps([(name, at, {"init_from": onevision(name)} | more) for name, at, more in ONEVISION])
        return
    yield from answers()
    yield "\n"
    yield from steps(TRAINING)


def answers() -> Iterator[str]:
    from avg_llava_jax.commands import planning
    from avg_llava_jax.parallel import chips

    yield head("answering", "parameters", "cache")
    for topology, settings in ANSWERING:
        config, target = config_of("avg_llava_7b", settings), chips.target(topology)
        shape = planning.largest_shape(planning.model_of(config))
        for plan in known(f"answering {topology}", planning.answering, config, target, shape, 128):
            yield cells(plan, f"{plan['program']}, {topology}")


def steps(training: "list[tuple[str, str, dict[str, Any]]]") -> Iterator[str]:
    from avg_llava_jax.commands import planning
    from avg_llava_jax.parallel import chips

    yield head("step", "trained", "frozen", "optimizer")
    for name, topology, settings in training:
        config, target = config_of(name, settings), chips.target(topology)
        shape = planning.largest_shape(planning.model_of(config))
        shown = (f" {key}={value}" for key, value in settings.items() if key != "init_from")
        label = f"`{name}` {topology}" + "".join(shown)
        (plan,) = known(label, planning.train_step, config, target, shape)
        yield cells(plan, label)
        for flag, other in planning.alternatives(config, target) if not plan["fits"] else ():
            if plan["fits"]:
                break
            with_it = f"{label} {flag.replace('--config.', '')}"
            (plan,) = known(with_it, planning.train_step, other, target, shape)
            yield cells(plan, with_it)


def main() -> None:
    from avg_llava_jax.files import around, write_whole

    begin, end = MARKS[BASE.value]
    around(DOCUMENT.value, begin, end)  # fail before the first line is computed
    lines = []
    for row in rows():
        print(row, end="", file=sys.stderr, flush=True)
        lines.append(row)
        before, after = around(DOCUMENT.value, begin, end)  # the document may have been edited meanwhile
        write_whole(DOCUMENT.value, before + "".join(lines) + after)


if __name__ == "__main__":
    cli.run(main, required=[], model_flags=())
