"""Plan the memory and time of a run on devices you do not have, by compiling its programs.

    avg-llava plan --config=configs/avg_llava_7b.py --topology=v5e:8x8 [--config.remat=dots ...]
    avg-llava plan --config=configs/avg_llava_7b.py --topology=v5e:2x2 --answering --config.batch_size=8 \\
        --config.mesh.fsdp=1 --config.mesh.tensor=4

    avg-llava plan --config=configs/avg_llava_7b.py --topology=h100:8x4    # 4 hosts of 8

Topologies are TPU slices such as v5e:4x4, v5p:2x2x4, v6e:4x4, tpu7x:2x2x1 (with `pip install -e '.[plan]'`); GPUs by
name and count: a100-40, a100-80, h100, h200, b200, rtx4090 (with `pip install -e '.[plan-gpu]'`); and cpu:8. A program
may use 75 % of a GPU's memory, JAX's default, or the share XLA_CLIENT_MEM_FRACTION.
Where the step does not fit, settings that need less memory are tried in turn, adapters (LoRA) and an int8 base last,
and the first that fits is named.
"""

import re
from typing import TYPE_CHECKING

from absl import flags

from avg_llava_jax.commands import cli

if TYPE_CHECKING:
    from avg_llava_jax.commands.planning import Plan

CONFIG = cli.define_config("The config, configs/X.py.")
TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:8x8, v6e:4x4, tpu7x:2x2x1, h100:8, b200:8x4, cpu:8, ...")
ANSWERING = flags.DEFINE_bool(
    "answering", False, "Plan for answering batch_size questions at a time, not for training."
)
TILES = flags.DEFINE_integer("tiles", 0, "Tile slots of a sample; 0 = one image of the largest mosaic.", 0)
TEXT = flags.DEFINE_integer("text", 512, "Text tokens of a sample.", 1)
ANSWER = flags.DEFINE_integer("answer", 128, "Answer tokens of a sample, or new tokens with --answering.", 1)
MOVES = flags.DEFINE_integer("moves", 0, "Lines to print on traffic between memory and cores, largest first.", 0)
ADVISE = flags.DEFINE_bool("advise", True, "Try other settings where these do not fit.")


def table(plans: "list[Plan]") -> str:
    """Memory per device by part, FLOPs, traffic and the lower bound on time of each program, one line per figure."""
    return "\n\n".join("\n".join(_lines(plan)) for plan in plans)


def _lines(plan: "Plan") -> list[str]:
    from avg_llava_jax.parallel.chips import GIB

    def number(value: float) -> str:
        return f"{value:>10.2f}" if value >= 1 else f"{value:>10.2g}"

    devices, memory, chip = len(plan.target.devices), plan.target.memory, plan.target.chip
    lines = [f"{plan.program} on {plan.target.topology}, {devices} devices"]
    lines += [f"  {kind:<22}{number(size / GIB)} GiB a device" for kind, size in plan.held.items()]
    if plan.temporaries is not None:
        lines.append(
            f"  {'temporaries':<22}{number(plan.temporaries / GIB)} GiB a device: activations, gradients, buffers"
        )
    if plan.total is None:
        lines.append(f"  {'in all':<22} more than the {number(memory / GIB).strip()} GiB of a device: DOES NOT FIT")
        lines.append(f"  XLA says: {plan.refused}")
    else:
        verdict = f" of {number(memory / GIB).strip()}: {'fits' if plan.fits else 'DOES NOT FIT'}" if memory else ""
        lines.append(f"  {'in all':<22}{number(plan.total / GIB)} GiB a device{verdict}")
    again = f", {plan.recomputed / plan.flops:.0%} of them again for the backward pass" if plan.recomputed else ""
    lines.append(f"  {'operations':<22}{number(plan.flops / 1e12)} TFLOP over all devices{again}")
    for kind, each in sorted(plan.traffic.items()):
        lines.append(f"  {kind:<22}{number(each.sent / 1e9)} GB sent by each device, {each.count} times")
    for resource, seconds in plan.seconds.items() if plan.fits else ():
        bound = "  <- the roofline" if seconds == max(plan.seconds.values()) else ""
        lines.append(f"  {resource + ' alone':<22}{number(seconds * 1e3)} ms{bound}")
    lines += _moves(plan, MOVES.value) if MOVES.value else []
    if chip and chip.card:
        lines.append("  not known without a GPU: how fast its kernels are, what overlaps, cuDNN's workspace")
    return lines


def _moves(plan: "Plan", count: int) -> list[str]:
    """The largest transfers between memory and cores, by the part of the model they come from."""
    from avg_llava_jax.parallel.chips import GIB

    by: dict[tuple[str, str], list[float]] = {}
    for each in plan.moves:
        found = by.setdefault((each.operation, re.sub(r"^jit\(\w+\)/", "", each.source)), [0, 0.0, 0.0])
        for at, value in enumerate((each.times, each.times * each.read, each.times * each.written)):
            found[at] += value
    moved, once = sum(each.bytes for each in plan.moves), sum(plan.held.values())
    turn = sum(each.bytes for each in plan.moves if each.a_turn)
    a_turn = f", {turn / GIB:.2f} of them for a token" if turn else ""
    lines = [
        f"  {'moves':<22}{moved / GIB:>10.2f} GiB between memory and cores, {moved / once:.2f} x arguments{a_turn}"
    ]
    for (operation, source), (times, read, written) in sorted(by.items(), key=lambda item: -sum(item[1][1:]))[:count]:
        lines.append(
            f"    reads {read / GIB:8.3f}, writes {written / GIB:8.3f} GiB, {times} times: {operation} {source}"
        )
    return lines


def state(plan: "Plan") -> int:
    """Bytes per device that persist between steps."""
    return sum(size for kind, size in plan.held.items() if kind != "batch")


def main() -> None:
    from avg_llava_jax.commands import planning
    from avg_llava_jax.parallel import chips

    config = CONFIG.value
    target = chips.target(TOPOLOGY.value)
    shape = planning.largest_shape(planning.model_of(config), TILES.value, TEXT.value, ANSWER.value)
    if ANSWERING.value:
        print(table(list(planning.answering(config, target, shape, ANSWER.value))))
        return
    plan = planning.train_step(config, target, shape)
    print(table([plan]), flush=True)
    if plan.fits is not False or not ADVISE.value:
        return
    if plan.total and target.chip.card and plan.total <= chips.LARGEST_SHARE * target.chip.memory:
        print(f"\nwith XLA_CLIENT_MEM_FRACTION={chips.LARGEST_SHARE} it fits a GPU that runs nothing else")
    for flag, other in planning.alternatives(config, target):
        print(f"\ntrying {flag}", flush=True)
        plan = planning.train_step(other, target, shape)
        print(table([plan]), flush=True)
        if plan.fits:
            print(f"\nwith {flag} it fits")
            return
    print(
        f"\nno setting fits: parameters and optimizer alone are {state(plan) / chips.GIB:.2f} GiB a device here; "
        "take a larger topology"
    )


def command() -> None:
    cli.run(main, required=["config", "topology"], model_flags=())
