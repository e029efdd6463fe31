"""Tell what a run would cost on devices that you lack: compile its real programs.

    avg-llava plan --config=configs/avg_llava_7b.py --topology=v5e:8x8 [--config.remat=dots ...]
    avg-llava plan --config=configs/avg_llava_7b.py --topology=v5e:2x2 --answering --config.batch_size=8 \\
        --config.mesh.fsdp=1 --config.mesh.tensor=4

Topologies: v5e:4x4, v5p:2x2x4, v6e:4x4 and other slices of these (they need `pip install -e '.[plan]'`), and cpu:8.
Where the step does not fit, settings that need less memory are tried in turn, and the first that fits is named.
"""

from typing import TYPE_CHECKING

from absl import flags

from avg_llava_jax.commands import cli

if TYPE_CHECKING:
    from avg_llava_jax.parallel.planning import Plan

CONFIG = cli.define_config("The config, configs/X.py.")
TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:8x8, v5p:2x2x4, v6e:4x4, cpu:8, ...")
ANSWERING = flags.DEFINE_bool(
    "answering", False, "Plan for answering batch_size questions at a time, not for training."
)
TILES = flags.DEFINE_integer("tiles", 0, "Tile slots of a sample; 0 = one image of the largest mosaic.", 0)
TEXT = flags.DEFINE_integer("text", 512, "Text tokens of a sample.", 1)
ANSWER = flags.DEFINE_integer("answer", 128, "Answer tokens of a sample, or new tokens with --answering.", 1)
ADVISE = flags.DEFINE_bool("advise", True, "Compile other settings where these do not fit.")


def table(plans: "list[Plan]") -> str:
    """GiB a device by part, operations, traffic and the least time of each program, one line a figure."""
    return "\n\n".join("\n".join(_lines(plan)) for plan in plans)


def _lines(plan: "Plan") -> list[str]:
    from avg_llava_jax.parallel.planning import GIB

    def number(value: float) -> str:
        return f"{value:>10.2f}" if value >= 1 else f"{value:>10.2g}"

    devices, chip = len(plan.target.devices), plan.target.chip
    lines = [f"{plan.program} on {plan.target.topology}, {devices} devices"]
    lines += [f"  {kind:<22}{number(size / GIB)} GiB a device" for kind, size in plan.held.items()]
    if plan.temporaries is not None:
        lines.append(
            f"  {'temporaries':<22}{number(plan.temporaries / GIB)} GiB a device: activations, gradients, buffers"
        )
    verdict = f" of {chip.memory / GIB:.2f}: {'fits' if plan.fits else 'DOES NOT FIT'}" if chip else ""
    lines.append(f"  {'in all':<22}{number(plan.total / GIB)} GiB a device{verdict}")
    again = f", {plan.recomputed / plan.flops:.0%} of them again for the backward pass" if plan.recomputed else ""
    lines.append(f"  {'operations':<22}{number(plan.flops / 1e12)} TFLOP over all devices{again}")
    for kind, each in sorted(plan.traffic.items()):
        lines.append(f"  {kind:<22}{number(each.sent / 1e9)} GB sent by each device, {each.count} times")
    for resource, seconds in plan.seconds.items() if plan.fits else ():
        bound = "  <- the roofline" if seconds == max(plan.seconds.values()) else ""
        lines.append(f"  {resource + ' alone':<22}{number(seconds * 1e3)} ms{bound}")
    return lines


def main() -> None:
    from avg_llava_jax.parallel import planning

    config = CONFIG.value
    target = planning.target(TOPOLOGY.value)
    shape = planning.largest_shape(planning.model_of(config), TILES.value, TEXT.value, ANSWER.value)
    if ANSWERING.value:
        print(table(list(planning.answering(config, target, shape, ANSWER.value))))
        return
    plan = planning.train_step(config, target, shape)
    print(table([plan]), flush=True)
    if plan.fits is not False or not ADVISE.value:
        return
    for flag, other in planning.knobs(config, len(target.devices)):
        print(f"\ntrying {flag}", flush=True)
        plan = planning.train_step(other, target, shape)
        print(table([plan]), flush=True)
        if plan.fits:
            print(f"\nwith {flag} it fits")
            return
    state = sum(size for kind, size in plan.held.items() if kind != "batch") / planning.GIB
    print(
        f"\nno setting fits: parameters and optimizer alone are {state:.2f} GiB a device here; take a larger topology"
    )


def command() -> None:
    cli.run(main, required=["config", "topology"], model_flags=())
