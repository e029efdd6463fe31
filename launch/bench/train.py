"""Speed of a training step and of its parts: python -m launch.bench.train --shape=7b --output=bench.json

Times the training step on random weights and a random batch of real shapes, then each part separately; for RGLF also
with the language model's runs padded to one length (`vmap`); and, where PyTorch is installed for the same device, the
same mathematics built from the transformers library's modules, in a separate process. Prints tables, and writes all
figures to --output.

    MFU = model FLOPs of a step / (seconds x devices x peak FLOP/s of a device in bfloat16)

Model FLOPs are the model's matrix products, 2 x M x N x K each, three times the forward pass for trained components
(`parallel/costs.py`); rematerialisation, padding to one length and repeated encoding do not count.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

from absl import flags

from avg_llava_jax.commands import cli

if TYPE_CHECKING:
    from avg_llava_jax.config import ModelConfig
    from avg_llava_jax.data.packing import Shape
    from avg_llava_jax.training.config import TrainConfig

PHASES = ("rglf", "multi_granularity")
SHAPE = flags.DEFINE_enum("shape", "jersey", ["jersey", "mid", "7b"], "Sizes of the model.")
PHASE = flags.DEFINE_multi_enum("phase", PHASES, PHASES, "Give it once for each phase; default: both.")
LAYERS = flags.DEFINE_integer("layers", None, "Layers of the language model, where all of the shape's do not fit.", 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Samples a step, over all devices; default: 8 a device.", 1)
TEXT = flags.DEFINE_integer("text", None, "Text tokens of a sample; default: 64 for jersey, 512.", 1)
ANSWER = flags.DEFINE_integer("answer", None, "Answer tokens of a sample; default: a quarter of the text.", 1)
COMPUTE = flags.DEFINE_enum(
    "compute_dtype", None, ["float32", "bfloat16"], "Default: bfloat16, float32 on a CPU, which computes faster in it."
)
REMAT = flags.DEFINE_enum("remat", "none", ["none", "dots", "full"], "What the backward pass computes again.")
REPEATS = flags.DEFINE_integer("repeats", 10, "How often each thing is timed; the median counts.", lower_bound=1)
BASELINE = flags.DEFINE_bool("baseline", True, "Time PyTorch too, where it is installed for the same device.")
OUTPUT = flags.DEFINE_string("output", None, "JSON file for the figures.")


def config_of(phase: str, rows: int, dtype: str, remat: str) -> "TrainConfig":
    """Training settings of a phase. RGLF has no remat, since it has no backward pass through the model."""
    from avg_llava_jax.training.config import TrainConfig

    remat = "none" if phase == "rglf" else remat
    return TrainConfig(phase=phase, batch_size=rows, compute_dtype=dtype, remat=remat)


def peak() -> tuple[float, str]:
    """Peak FLOP/s of a device, and the source of that figure."""
    import jax
    import jax.numpy as jnp

    from avg_llava_jax.parallel import chips

    kind = jax.devices()[0].device_kind
    if chip := chips.by_kind(kind):
        return chip.flops, f"{kind}: the maker's figure for bfloat16"
    from launch.bench.parts import seconds

    size, product = 2048, jax.jit(jnp.dot)
    matrix = jnp.ones((size, size), COMPUTE.value or "float32")
    best = min(seconds({"": lambda: product(matrix, matrix)}, 5)[""])
    return 2 * size**3 / best, f"{kind}: measured, the best of 5 products of {size} x {size} {matrix.dtype} matrices"


def measure(config: "TrainConfig", model: "ModelConfig", shape: "Shape", repeats: int) -> dict[str, Any]:
    """Seconds and model FLOPs of the step and of its parts."""
    import jax

    from avg_llava_jax import parameters
    from avg_llava_jax.parallel import costs, sharding
    from avg_llava_jax.training import setup
    from avg_llava_jax.training.step import Step
    from launch.bench import parts as bench_parts

    rows = config.batch_size
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh))
    setup.check_step(config, mesh)
    work = costs.step_flops(model, config.phase, model.granularities, rows, shape)
    with jax.set_mesh(mesh):
        steps = {}
        for execution in ("per_length", "vmap") if config.phase == "rglf" else ("per_length",):
            rglf = dataclasses.replace(config.rglf, execution=execution)
            steps[execution] = Step(dataclasses.replace(config, rglf=rglf), model, mesh)
        step = steps["per_length"]
        places = jax.tree.map(lambda leaf: leaf.sharding, step.params)
        dtypes = setup.dtypes(config)
        params = jax.jit(lambda key: parameters.init(model, key, dtypes), out_shardings=places)(jax.random.key(0))
        batch = jax.device_put(bench_parts.random_batch(model, rows, shape), step.rows)
        whole = bench_parts.Whole(steps, params, batch)
        del params
        say(f"{config.phase}: the whole step")
        took = bench_parts.seconds({name: whole.run(name) for name in steps}, repeats)
        of_parts = {}
        for part in bench_parts.parts(config, model, whole, batch):
            say(f"{config.phase}: {part.name}")
            of_parts[part.name] = statistics.median(bench_parts.seconds({part.name: part.run}, repeats)[part.name])
    lengths = {g: shape.length(model, g) for g in model.granularities}
    return {
        "batch_size": rows,
        "tiles": shape.tiles,
        "text": shape.text,
        "answer": shape.answer,
        "lengths": lengths,
        "model_flops": sum(work.values()),
        "step": {name: {"seconds": statistics.median(each), "all": each} for name, each in took.items()},
        "language_model": {name: of_parts.pop(name) for name in steps if name in of_parts},
        "parts": {name: {"seconds": each, "model_flops": work.get(name, 0)} for name, each in of_parts.items()},
    }


def baseline(
    config: "TrainConfig", model: "ModelConfig", shape: "Shape", platform: str, devices: int, repeats: int
) -> dict[str, Any]:
    """The results of `torch_baseline` on one device with its share of the batch, or {"left_out": reason}."""
    from launch.bench import parts as bench_parts

    rows = max(1, config.batch_size // devices)
    say(f"{config.phase}: PyTorch")
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "batch.npz"
        write_batch(file, model, rows, shape)
        work = baseline_work(config, model, platform) | {
            "batch": str(file),
            "repeats": repeats,
            "warm_up": bench_parts.WARM_UP,
        }
        command = [sys.executable, "-m", "launch.bench.torch_baseline"]
        done = subprocess.run(command, input=json.dumps(work), capture_output=True, text=True)
    if done.returncode:
        return {"left_out": done.stderr.strip().rpartition("\n")[2]}
    return {"batch_size": rows, **json.loads(done.stdout)}


def baseline_work(config: "TrainConfig", model: "ModelConfig", platform: str) -> dict[str, Any]:
    """The description of a step for `launch.bench.torch_baseline`, as JSON values."""
    from avg_llava_jax.config import to_dict
    from avg_llava_jax.convert import llava_next

    values = llava_next.to_config(model, {}, {llava_next.IMAGE: 0}, model.language.vocab_size, router=False)
    return {
        "phase": config.phase,
        "platform": "cuda" if platform == "gpu" else platform,
        "compute_dtype": config.compute_dtype,
        "remat": config.remat,
        "model": to_dict(model),
        "granularities": list(model.granularities),
        "text_config": values["text_config"],
        "vision_config": values["vision_config"],
        "rglf": dataclasses.asdict(config.rglf),
        "learning_rate": config.optimizer.learning_rate,
    }


def write_batch(file: pathlib.Path, model: "ModelConfig", rows: int, shape: "Shape") -> None:
    """Write a random batch as a file of arrays; those of granularity g are named `index/g` and `target_at/g`."""
    import numpy as np

    from launch.bench import parts as bench_parts

    batch = bench_parts.random_batch(model, rows, shape)
    arrays = {key: value for key, value in batch.items() if not isinstance(value, dict)}
    arrays |= {f"{key}/{g}": batch[key][g] for key in ("index", "target_at") for g in model.granularities}
    np.savez(file, **arrays)


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def table(phase: str, found: dict[str, Any], devices: int, most: float) -> str:
    """The figures of one phase as Markdown. most: peak FLOP/s of a device."""
    if "left_out" in found:
        return f"### {phase}\n\n{found['left_out']}\n"
    took, flops = found["step"]["per_length"]["seconds"], found["model_flops"]
    rows, tokens = found["batch_size"], found["batch_size"] * sum(found["lengths"].values())
    rate = flops / took
    lines = [
        f"### {phase}",
        "",
        f"{rows} samples of {found['tiles']} tiles and {found['text']} text tokens, {found['answer']} of them answer, "
        f"packed to {', '.join(map(str, found['lengths'].values()))}",
        "",
        "| seconds a step | samples/s | tokens/s | TFLOP/s | MFU |",
        "|---|---|---|---|---|",
        f"| {took:.4f} | {rows / took:.2f} | {tokens / took:.0f} | {rate / 1e12:.2f} | {rate / devices / most:.1%} |",
        "",
        "| part | seconds | share of the step | TFLOP/s | MFU |",
        "|---|---|---|---|---|",
    ]
    parts = {name: (part["seconds"], part["model_flops"]) for name, part in found["parts"].items()}
    parts["sum of parts"] = sum(each for each, _ in parts.values()), flops
    for name, (seconds, work) in parts.items():
        speed = f"{work / seconds / 1e12:.2f} | {work / seconds / devices / most:.1%}" if work else "– | –"
        lines.append(f"| {name} | {seconds:.4f} | {seconds / took:.0%} | {speed} |")
    compared = {}
    if "vmap" in found["step"]:
        compared["step with one padded vmap"] = found["step"]["vmap"]["seconds"] / took
        language = found["language_model"]
        compared["its language model alone"] = language["vmap"] / language["per_length"]
    torch = found.get("torch", {})
    for name, seconds in torch.get("step", {}).items():
        compared[f"PyTorch, {name}"] = seconds / torch["batch_size"] / (took / rows * devices)
    lines += ["", "| against | times as long a sample and device |", "|---|---|"]
    lines += [f"| {name} | {ratio:.2f} |" for name, ratio in compared.items()]
    if "left_out" in torch:
        lines.append(f"| PyTorch | left out: {torch['left_out']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch comes first, and needs room
    import jax

    from avg_llava_jax.commands import planning
    from avg_llava_jax.files import write_json
    from launch.bench.parts import model_of

    platform, devices = jax.default_backend(), jax.device_count()
    dtype = COMPUTE.value or ("float32" if platform == "cpu" else "bfloat16")
    rows = BATCH_SIZE.value or 8 * devices
    model = model_of(SHAPE.value, LAYERS.value)
    text = TEXT.value or (64 if SHAPE.value == "jersey" else 512)
    shape = planning.largest_shape(model, text=text, answer=ANSWER.value or text // 4)
    if shape.answer >= shape.text:
        raise ValueError(f"--answer={shape.answer} is a part of --text={shape.text}, and leaves some for the question")
    configs = {phase: config_of(phase, rows, dtype, REMAT.value) for phase in PHASE.value}
    phases: dict[str, Any] = {phase: {} for phase in configs}
    against = {
        phase: baseline(config, model, shape, platform, devices, REPEATS.value)
        for phase, config in configs.items()
        if BASELINE.value
    }
    flops, source = peak()
    for phase, config in configs.items():
        try:
            phases[phase] = measure(config, model, shape, REPEATS.value)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            phases[phase] = {"left_out": "does not fit: take a smaller --batch_size, --remat=full, or fewer --layers"}
        if phase in against:
            phases[phase]["torch"] = against[phase]
    print(f"\n## {SHAPE.value}, {dtype}, {devices} x {source}\n\nPeak {flops / 1e12:.3f} TFLOP/s a device.\n")
    for phase, found in phases.items():
        print(table(phase, found, devices, flops))
    if OUTPUT.value:
        machine = {"devices": devices, "kind": jax.devices()[0].device_kind, "peak": flops, "peak_source": source}
        settings = {"shape": SHAPE.value, "layers": model.language.layers, "compute_dtype": dtype, "remat": REMAT.value}
        write_json(OUTPUT.value, {"machine": machine, "jax": jax.__version__, **settings, "phases": phases})


if __name__ == "__main__":
    cli.run(main, required=[], model_flags=())
