"""Speed of answering, and its bounds: python -m launch.bench.inference --shape=jersey --workdir=OUT

Answers the same questions at each granularity and at the router's choice, one at a time (time to first token, time per
further token) and with several requests in flight (answers per second). For comparison it measures the bounds set by
this machine's matrix products and memory, and, where torch is installed, the transformers library's model on the
exported weights. Writes OUT/inference.json and OUT/inference.md.

Shapes: `jersey`, the shipped checkpoint; `mid`, a ViT-B/14 at 336 pixels and a Llama of 8 layers, 1024 wide; `7b`,
AVG-LLaVA in bfloat16, for an accelerator. The last two have random weights. Every image is different square noise of
2 x 2 tiles and the overview. No answer ends before --new_tokens.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import statistics
import tempfile
import time
from typing import TYPE_CHECKING, Any

from absl import flags

from avg_llava_jax.commands import cli

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image

    from avg_llava_jax.config import ModelConfig
    from avg_llava_jax.inference.api import AvgLlava

SHAPE = flags.DEFINE_enum("shape", "jersey", ["jersey", "mid", "7b"], "What is measured.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the figures go.")
THREADS = flags.DEFINE_integer("threads", 0, "CPU threads for both sides; 0 = as many as there are.", lower_bound=0)
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 32, "Tokens of every answer.", lower_bound=2)
REPEATS = flags.DEFINE_integer("repeats", 3, "How often one answer is timed; the median counts.", lower_bound=1)
CLOCK = flags.DEFINE_enum(
    "clock",
    "wall",
    ["wall", "cpu"],
    "How one answer is timed: cpu counts this process's CPU seconds, on a busy machine.",
)
WAYS = flags.DEFINE_list("granularities", None, "Tokens per tile, or auto; default: all of them.")
IN_FLIGHT = flags.DEFINE_list("in_flight", "1,8,32", "Requests at once in the engine; empty leaves it out.")
SLOTS = flags.DEFINE_integer("slots", 8, "Answers that the engine lets grow at once.", lower_bound=1)
TORCH = flags.DEFINE_bool("torch", True, "Compare with PyTorch, where it is installed.")
QUANTIZE = flags.DEFINE_bool("int8", False, "Quantize our language model.")

PROMPT = "What number is on the shirt of the player in the middle?"


def pin(threads: int) -> None:
    """Pin this process to a number of CPUs. Must come before JAX starts its threads."""
    if threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        os.environ["OMP_NUM_THREADS"] = str(threads)
    if threads == 1:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"


def config_of(shape: str) -> ModelConfig:
    """The config of a shape with random weights."""
    from avg_llava_jax.config import LanguageConfig, ModelConfig, VisionConfig

    if shape == "7b":
        return ModelConfig(template="mistral_instruct")
    vision = VisionConfig(width=768, layers=12, heads=12, mlp_width=3072)
    language = LanguageConfig(
        width=1024, layers=8, heads=16, kv_heads=16, head_dim=64, mlp_width=4096, max_length=3072
    )  # fmt: skip
    return ModelConfig(vision=vision, language=language, template="mistral_instruct")


def model_of(shape: str) -> AvgLlava:
    """The model, without stop tokens, so that every answer reaches --new_tokens."""
    import jax

    from avg_llava_jax import SHIPPED, parameters
    from avg_llava_jax.data.tokenizer import load_tokenizer
    from avg_llava_jax.inference.api import AvgLlava

    if shape == "jersey":
        model = AvgLlava.load()
    else:
        config = config_of(shape)
        dtype = "bfloat16" if shape == "7b" else None
        params = jax.jit(lambda: parameters.init(config, jax.random.key(0), dtype))()
        model = AvgLlava(config, params, load_tokenizer(SHIPPED / "tokenizer"))
    model.stop_ids = (-1,)
    return model


def photos(config: ModelConfig, count: int, seed: int) -> list[Image.Image]:
    import numpy as np
    from PIL import Image

    rng, side = np.random.default_rng(seed), 2 * config.vision.image_size
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(count)]


def one_answer(answer: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """Seconds of one answer: `ttft` to its first token, `tpot` for each further one, `total`.

    answer: generates a number of tokens from an image and a question. It is called twice, for one token and for all, so
    that both sides are measured alike; `generate` of the other side shows nothing before its end.
    """
    clock = time.process_time if CLOCK.value == "cpu" else time.perf_counter
    begin = clock()
    answer(1)
    first = clock()
    about = answer(NEW_TOKENS.value)
    ttft, total = first - begin, clock() - first
    return {"ttft": ttft, "tpot": (total - ttft) / (NEW_TOKENS.value - 1), "total": total} | about


def our_answer(model: AvgLlava, image: Image.Image, way: int | str, new_tokens: int) -> dict[str, Any]:
    model.forget()
    answer = model.answer(image, PROMPT, granularity=way, max_new_tokens=new_tokens)
    about = {"granularity": answer.granularity, "visual_tokens": answer.visual_tokens}
    return about | {"token_ids": list(answer.token_ids)}


def median_of(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the measured seconds, and the first value of everything else."""
    return {
        key: statistics.median(each[key] for each in measured) if isinstance(value, float) else value
        for key, value in measured[0].items()
    }


def engine_rates(
    model: AvgLlava, ways: list[int | str], in_flight: list[int]
) -> dict[str, dict[str, dict[str, float]]]:
    """By policy and requests in flight: answers per second, and mean seconds to the first and per further token."""
    from avg_llava_jax.inference.engine import Engine
    from avg_llava_jax.inference.requests import Request

    engine = Engine(model, slots=SLOTS.value, queue=max(in_flight))
    engine.warm_up()
    engine.start()
    rates: dict[str, dict[str, dict[str, float]]] = {}
    for way in ways:
        for count in in_flight:
            images = photos(model.config, max(count, 2), seed=1000 * count + len(rates))
            before, begin = engine.stats(), time.perf_counter()
            for at in range(0, len(images), count):  # one at a time, or all of them
                tickets = [
                    engine.submit(Request(PROMPT, image, granularity=way, max_new_tokens=NEW_TOKENS.value))
                    for image in images[at : at + count]
                ]
                for ticket in tickets:
                    ticket.result()
            seconds, after = time.perf_counter() - begin, engine.stats()
            rates.setdefault(str(way), {})[str(count)] = {
                "requests_per_second": len(images) / seconds,
                "ttft": (after.ttft_seconds - before.ttft_seconds) / (after.ttft_count - before.ttft_count),
                "tpot": (after.token_seconds - before.token_seconds) / (after.token_count - before.token_count),
            }
            print(f"engine, {way}, {count} in flight: {len(images) / seconds:.3f} answers/s", flush=True)
    engine.close()
    return rates


def measured_peaks(dtype: Any) -> dict[str, float]:
    """The machine's peaks in this process: FLOP/s of a large matrix product, bytes/s of a long sum."""
    import jax
    import jax.numpy as jnp

    side, long = (2048, 2**27) if jax.default_backend() == "cpu" else (8192, 2**31)

    def best(function: Any, *arrays: jax.Array) -> float:
        compiled, times = jax.jit(function), []
        for _ in range(6):
            begin = time.perf_counter()
            jax.block_until_ready(compiled(*arrays))
            times.append(time.perf_counter() - begin)
        return min(times[1:])

    square = jnp.ones((side, side), dtype)
    flops = 2 * side**3 / best(lambda a: a @ a, square)
    row = jnp.ones(long // square.dtype.itemsize, dtype)
    return {"flops": flops, "bandwidth": row.nbytes / best(jnp.sum, row)}


def roofline(model: AvgLlava, measured: dict[str, Any], routed: bool, peaks: dict[str, float]) -> dict[str, float]:
    """Lower bounds of one answer: FLOPs to the first token, bytes per further token, and their seconds.

    FLOPs are those of the matrix products that run, at the packed length itself. A token reads every weight of the
    language model (of an untied embedding one row) and the keys and values of all tokens before it.
    """
    import jax
    import jax.numpy as jnp

    from avg_llava_jax import parameters
    from avg_llava_jax.inference.requests import Request
    from avg_llava_jax.models import avg_llava
    from avg_llava_jax.models import language as decoders
    from avg_llava_jax.models.cache import Span, empty_cache
    from avg_llava_jax.parallel import costs

    config, params, language = model.config, model.params, model.config.language
    side, dtype = config.vision.image_size, params["image_newline"].dtype
    sample = model.prepare(Request(PROMPT, photos(config, 1, 0))).sample
    length = len(sample.tokens.ids) - 1 + measured["visual_tokens"]

    def flops(function: Any, *shapes: Any) -> float:
        return costs.flops(jax.make_jaxpr(function)(params, *shapes).jaxpr)

    pixels = jax.ShapeDtypeStruct((1, 5, side, side, 3), jnp.uint8)
    pyramid = jax.ShapeDtypeStruct((1, 5, config.pyramid_rows, language.width), dtype)
    text = jax.ShapeDtypeStruct((1, len(sample.tokens.ids), language.width), dtype)
    packed = jax.ShapeDtypeStruct((1, length, language.width), dtype)
    batch = {
        "instruction": jnp.ones(text.shape[:2], bool),
        "tile_image": jnp.zeros((1, 5), jnp.int32),
        "first_tile": jnp.zeros((1, 1), jnp.int32),
    }
    cache = empty_cache(language, 1, length, dtype)

    def prefill(params: Any, packed: jax.Array) -> Any:
        start = jnp.zeros(1, jnp.int32)
        return decoders.decoder(language, params["language"], packed, cache, Span(start, window=0), start)

    parts = {
        "see": flops(lambda params, pixels: avg_llava.pyramid_of(config, params, pixels), pixels),
        "route": flops(lambda params, *rows: avg_llava.route(config, params, *rows, batch), pyramid, text)
        if routed
        else 0.0,
        "prefill": flops(prefill, packed),
    }
    leaves = parameters.flat(params["language"])
    unread = () if language.tied_embeddings else ("embed", "embed_scale")
    weights = sum(leaf.nbytes for path, leaf in leaves.items() if path not in unread)
    cached = 2 * language.layers * language.kv_heads * language.head_dim * dtype.itemsize
    token = weights + cached * (length + NEW_TOKENS.value / 2)
    return {
        **{f"{name}_flops": value for name, value in parts.items()},
        "token_bytes": token,
        "ttft": sum(parts.values()) / peaks["flops"],
        "tpot": token / peaks["bandwidth"],
    }


def exported(model: AvgLlava, shape: str, folder: pathlib.Path) -> pathlib.Path:
    """Export the model for the transformers library."""
    from avg_llava_jax import SHIPPED
    from avg_llava_jax.checkpoint import Loaded
    from avg_llava_jax.convert import convert

    source = SHIPPED
    if shape != "jersey":
        source = folder / "ours"
        source.mkdir()
        meta = {"step": 0, "training": None, "granularities_trained": None}
        convert.write_checkpoint(Loaded(model.config, model.params, model.tokenizer.folder, meta), source)
    convert.export_transformers(source, folder / "theirs")
    return folder / "theirs"


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    head = "| tokens a tile | visual tokens | ttft s | bound s | tpot ms | bound ms | answer s | ×finest |"
    names = {name for row in report["ways"].values() for name in row.get("torch", {})}
    torch = [name for name in ("adaptive", "llava_next") if name in names]
    flight = list(next(iter(report["engine"].values()), {}))
    head += "".join(f" {name} in PyTorch s | ratio |" for name in torch)
    head += "".join(f" answers/s, {count} in flight |" for count in flight)
    lines = [head, "|" + "---:|" * (head.count("|") - 1)]
    finest = list(report["ways"].values())[-1 - ("auto" in report["ways"])]["ours"]["total"]
    for way, row in report["ways"].items():
        ours, bound = row["ours"], row["bound"]
        cells = [f"{way}" if way != "auto" else f"auto: {ours['granularity']}", f"{ours['visual_tokens']}"]
        cells += [f"{ours['ttft']:.3f}", f"{bound['ttft']:.3f}", f"{ours['tpot'] * 1e3:.1f}"]
        cells += [f"{bound['tpot'] * 1e3:.1f}", f"{ours['total']:.3f}", f"{finest / ours['total']:.2f}"]
        for name in torch:
            theirs = row["torch"].get(name)
            cells += [f"{theirs['total']:.3f}", f"{theirs['total'] / ours['total']:.2f}"] if theirs else ["", ""]
        rates = report["engine"].get(way, {})
        cells += [f"{rates[count]['requests_per_second']:.3f}" if count in rates else "" for count in flight]
        lines.append("| " + " | ".join(cells) + " |")
    peaks = report["peaks"]
    lines += [
        "",
        f"`{report['shape']}`, {report['dtype']}, {report['device']}, {report['threads'] or 'all'} threads, "
        f"{report['new_tokens']} new tokens, medians of {report['repeats']} by the {report['clock']} clock. Bounds: "
        f"{peaks['flops'] / 1e9:.0f} GFLOP/s and {peaks['bandwidth'] / 1e9:.1f} GB/s, measured here by one matrix "
        "product and one sum.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    pin(THREADS.value)
    import jax

    from avg_llava_jax.convert.quantize import quantized
    from avg_llava_jax.files import write_whole

    workdir = pathlib.Path(WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    if SHAPE.value == "7b" and jax.default_backend() == "cpu":
        raise ValueError("--shape=7b is for an accelerator, and there is none: use --shape=mid")
    model = model_of(SHAPE.value)
    known = [*map(str, model.config.granularities), "auto"]
    wanted = WAYS.value or known
    if set(wanted) - set(known):
        raise ValueError(f"--granularities={','.join(wanted)}: choose of {', '.join(known)}")
    ways: list[int | str] = [way if way == "auto" else int(way) for way in known if way in wanted]

    theirs: dict[str, Any] = {}
    if TORCH.value:
        from launch.bench import torch_parity as bench_torch

        if bench_torch.installed():
            with tempfile.TemporaryDirectory(dir=workdir) as folder:
                print("exporting for PyTorch", flush=True)
                theirs = bench_torch.load(exported(model, SHAPE.value, pathlib.Path(folder)), THREADS.value)
    if QUANTIZE.value:
        stops, model = model.stop_ids, type(model)(model.config, quantized(model.params), model.tokenizer)
        model.stop_ids = stops

    image = photos(model.config, 1, seed=0)[0]
    measured: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for repeat in range(REPEATS.value + 1):  # in turn, so that what else the machine does meets all; the first compiles
        for way in ways:
            one = {"ours": one_answer(functools.partial(our_answer, model, image, way))}
            for name, model_of_theirs in theirs.items():
                if name == "adaptive" or way == model.config.granularities[-1]:
                    one[name] = one_answer(functools.partial(model_of_theirs.answer, image, PROMPT, way))
            for name, seconds in one.items():
                if repeat:
                    measured.setdefault((str(way), name), []).append(seconds)
            line = ", ".join(f"{name} {seconds['total']:.3f} s" for name, seconds in one.items())
            print(f"{repeat}/{REPEATS.value}, {way}: {line}" + ("" if repeat else " (with compilation)"), flush=True)

    dtype = model.params["image_newline"].dtype
    peaks = measured_peaks(dtype)
    rows: dict[str, Any] = {}
    for way in map(str, ways):
        ours = median_of(measured[way, "ours"])
        torch = {name: median_of(measured[way, name]) for name in theirs if (way, name) in measured}
        for each in torch.values():
            each["same_tokens"] = each["token_ids"] == ours["token_ids"]
        bound = roofline(model, ours, way == "auto", peaks)
        rows[way] = {"ours": ours, "bound": bound, "torch": torch}
    report = {
        "shape": SHAPE.value,
        "device": jax.devices()[0].device_kind,
        "threads": THREADS.value,
        "dtype": str(dtype) + (", int8 weights" if QUANTIZE.value else ""),
        "new_tokens": NEW_TOKENS.value,
        "clock": CLOCK.value,
        "repeats": REPEATS.value,
        "peaks": peaks,
        "ways": rows,
        "engine": engine_rates(model, ways, sorted(map(int, IN_FLIGHT.value))) if any(IN_FLIGHT.value) else {},
    }
    write_whole(workdir / "inference.json", json.dumps(report, indent=1) + "\n")
    write_whole(workdir / "inference.md", table(report))
    print(table(report) + str(workdir / "inference.md"))


if __name__ == "__main__":
    cli.run(main, required=["workdir"], model_flags=())
