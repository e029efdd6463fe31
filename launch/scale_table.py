"""Writes the tables of docs/scale.md anew: python -m launch.scale_table

They hold what `launch.plan` says of the 7B, both phases and answering, on several topologies; about a minute a line.
"""

import importlib
import sys
from collections.abc import Iterator

from absl import flags

from launch import cli

DOCUMENT = flags.DEFINE_string("document", "docs/scale.md", "Where the tables stand.")
BEGIN, END = "<!-- plans: python -m launch.scale_table -->\n", "<!-- end of plans -->\n"

TRAINING = [
    (config, topology, {})
    for config in ("avg_llava_7b", "avg_llava_7b_router")
    for topology in ("v5e:8x8", "v6e:4x4", "v5p:2x2x4")
] + [("avg_llava_7b", "v5p:2x2x4", {"remat": "dots"})]
"""Config, topology, and what differs from the config."""

ANSWERING = [
    ("v5e:2x2", {"batch_size": 8, "mesh.fsdp": 1, "mesh.tensor": 4}),
    ("v6e:2x2", {"batch_size": 8, "mesh.fsdp": 1, "mesh.tensor": 4}),
]
"""Topology and settings."""


def rows() -> Iterator[str]:
    from avg_llava_jax.parallel import planning

    def cells(plan: planning.Plan, name: str) -> str:
        kinds = ("trained", "frozen", "optimizer") if "trained" in plan.held else ("parameters", "cache")
        parts = [f"{plan.held.get(kind, 0) / planning.GIB:.2f}" for kind in kinds]
        temporaries = "–" if plan.temporaries is None else f"{plan.temporaries / planning.GIB:.2f}"
        sent = {kind: plan.traffic[kind].sent / 1e9 if kind in plan.traffic else 0.0 for kind in SHOWN}
        seconds = plan.seconds
        numbers = [
            name,
            *parts,
            temporaries,
            f"{plan.total / planning.GIB:.2f}" + ("" if plan.fits else " **no**"),
            f"{plan.flops / 1e12:.1f}",
            f"{plan.recomputed / plan.flops:.0%}",
            *(f"{each:.1f}" for each in sent.values()),
            *(f"{seconds[kind] * 1e3:.1f}" for kind in ("compute", "network", "memory")),
        ]
        return "| " + " | ".join(numbers) + " |\n"

    def head(*first: str) -> str:
        names = [*first, "temporaries", "in all", "TFLOP", "again", *SHOWN, "compute ms", "network ms", "memory ms"]
        return "| " + " | ".join(names) + " |\n|" + "---|" * len(names) + "\n"

    yield head("step", "trained", "frozen", "optimizer")
    for name, topology, settings in TRAINING:
        config = importlib.import_module(f"configs.{name}").get_config()
        config.update_from_flattened_dict(settings)
        target = planning.target(topology)
        shape = planning.largest_shape(planning.model_of(config))
        label = " ".join([f"`{name}`", topology, *(f"{key}={value}" for key, value in settings.items())])
        yield cells(planning.train_step(config, target, shape), label)
    yield "\n"
    yield head("answering", "parameters", "cache")
    for topology, settings in ANSWERING:
        config = importlib.import_module("configs.avg_llava_7b").get_config()
        config.update_from_flattened_dict(settings)
        target = planning.target(topology)
        shape = planning.largest_shape(planning.model_of(config))
        for plan in planning.answering(config, target, shape, 128):
            yield cells(plan, f"{plan.program}, {topology}")


SHOWN = ("all-gather", "all-reduce", "reduce-scatter")


def main() -> None:
    from avg_llava_jax.files import around, write_whole

    before, after = around(DOCUMENT.value, BEGIN, END)
    lines = []
    for row in rows():
        print(row, end="", file=sys.stderr, flush=True)
        lines.append(row)
    write_whole(DOCUMENT.value, before + "".join(lines) + after)


if __name__ == "__main__":
    cli.run(main, required=[], model_flags=())
