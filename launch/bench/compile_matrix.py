"""Compile every program of the project for GPUs and TPUs, and write the tables of docs/compile_matrix.md.

    python -m launch.bench.compile_matrix
    python -m launch.bench.compile_matrix --target=h100:1 --target=h100:8/fsdp=4,tensor=2 --cases='7B.*rglf' --tables=

The devices need not be present. Each target compiles in a separate process, since a compiler can crash or hang; that is
a line of the table, and the next program follows. A program passes if it compiles, fits, overwrites its donated
arguments, and holds and sends nothing that `judge` does not expect. Results are kept in --known and written to the
document at once; those of the same code and jax are reused, and no others. It exits with 1 where something fails.

A new program is one more entry of `CASES`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from absl import flags

from avg_llava_jax import reuse
from avg_llava_jax.commands import cli

if TYPE_CHECKING:
    from avg_llava_jax.commands.planning import Program
    from avg_llava_jax.config import ModelConfig
    from avg_llava_jax.data.packing import Shape
    from avg_llava_jax.parallel.chips import Target

TARGETS = (
    "h100:1",
    "h100:8/fsdp=8",
    "h100:8/tensor=8",
    "h100:8/data=8",
    "a100-80:8/fsdp=8",
    "h200:1",
    "b200:8/fsdp=8",
    "v5e:2x2/fsdp=4",
    "v6e:2x2/fsdp=4",
    "v5p:2x2x1/fsdp=4",
    "tpu7x:2x2x1/fsdp=8",
)
"""Topology and mesh."""

CHOSEN = flags.DEFINE_multi_string("target", TARGETS, "TOPOLOGY or TOPOLOGY/MESH, as h100:8/fsdp=4,tensor=2.")
ONLY = flags.DEFINE_string("cases", "", "Cases whose names this regular expression is found in.")
LIMIT = flags.DEFINE_float("limit_s", 600.0, "Seconds after which a compiler is ended.")
WORKDIR = flags.DEFINE_string("known", "workdirs/compile_matrix", "Keeps what is known already.")
DOCUMENT = flags.DEFINE_string("tables", "docs/compile_matrix.md", "Where the tables stand; empty = printed alone.")
CHILD = flags.DEFINE_string("child", "", "Compile for this target, and say so line by line.")
BEGIN, END = "<!-- matrix: python -m launch.bench.compile_matrix -->\n", "<!-- end of matrix -->\n"

LAYERS = 2
"""Of encoder and language model at the 7B's shapes: more of them are the same program, a loop that runs longer."""

ROWS = 2
"""Samples of each copy of the model in a micro-batch."""


def models() -> dict[str, tuple[ModelConfig, str, dict[str, int]]]:
    """Model, compute dtype and text tokens by name: the 7B cut to `LAYERS`, and the tests' tiny model."""
    from avg_llava_jax.commands import planning
    from avg_llava_jax.config import LanguageConfig, ModelConfig, VisionConfig
    from avg_llava_jax.configs import jersey

    seven = ModelConfig(vision=VisionConfig(layers=LAYERS + 1), language=LanguageConfig(layers=LAYERS))
    tiny = planning.model_of(jersey.get_config("tiny"))
    return {
        "7B": (seven, "bfloat16", {"text": 512, "answer": 128}),
        "tiny": (tiny, "float32", {"text": 32, "answer": 16}),
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """One or several programs. make: traces them for a target and the sizes of a mesh."""

    name: str
    make: Callable[[Target, Mapping[str, int]], Iterator[Program]]
    heads: Mapping[int, int] = dataclasses.field(default_factory=dict)
    """By length, the query heads of the sequences whose scores must not lie in memory."""


def training(name: str, beside: bool = False, **settings: Any) -> Case:
    """The training step, or what runs beside it: the optimizer's first state, validation, feedback and `explain`."""
    model, dtype, sizes = models()[name]
    shape = _shape(model, sizes)
    shown = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items() if key != "phase")

    def make(target: Target, mesh: Mapping[str, int]) -> Iterator[Program]:
        from avg_llava_jax.commands import planning
        from avg_llava_jax.training.config import defaults

        config = defaults()
        config.update_from_flattened_dict({"compute_dtype": dtype, **settings})
        config.mesh.update(mesh)
        config.batch_size = ROWS * mesh["data"] * mesh["fsdp"] * config.optimizer.accumulate
        if beside:
            yield from planning.beside_training(config, model, target, shape)
        else:
            yield planning.training(config, model, target, shape)._replace(name="")

    what = f"{name} beside {settings['phase']}" if beside else f"{name} {settings['phase']} {shown}".strip()
    return Case(what, make, _heads(model, shape))


def answering(name: str, dtype: str) -> Case:
    """The programs of the engine."""
    model, _, sizes = models()[name]
    shape = _shape(model, sizes)

    def make(target: Target, mesh: Mapping[str, int]) -> Iterator[Program]:
        from avg_llava_jax.commands import planning
        from avg_llava_jax.training.config import defaults

        config = defaults()
        config.update({"compute_dtype": dtype, "batch_size": ROWS * mesh["data"] * mesh["fsdp"]})
        config.mesh.update(mesh)
        yield from planning.answers(config, model, target, shape, 64)

    return Case(f"{name} answering {dtype}", make, _heads(model, shape))


def attending(length: int, heads: tuple[int, int], size: int, causal: bool, dtype: str) -> Case:
    """`self_attention` alone, forward and backward: (query heads, key heads) of one size."""

    def make(target: Target, mesh: Mapping[str, int]) -> Iterator[Program]:
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding

        from avg_llava_jax import placement
        from avg_llava_jax.commands import planning
        from avg_llava_jax.models.attention import self_attention
        from avg_llava_jax.parallel import sharding

        devices = sharding.make_mesh(mesh, target.devices)

        def array(count: int) -> jax.ShapeDtypeStruct:
            shape = (ROWS * mesh["data"] * mesh["fsdp"], length, count, size)
            spec = placement.fitting(devices, placement.spec("batch", None, "heads", None), shape)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(devices, spec))

        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.sum(self_attention(q, k, v, causal).astype(jnp.float32))

        q, k = array(heads[0]), array(heads[1])
        with jax.set_mesh(devices):
            traced = jax.jit(jax.value_and_grad(total, (0, 1, 2))).trace(q, k, k)
        yield planning.Program("", traced, {"batch": (q, k, k)})

    shown = f"{length} x {'/'.join(map(str, heads))} x {size} {dtype}{' causal' if causal else ''}"
    return Case(f"attention {shown}", make, {length: heads[0]})


CASES: list[Callable[[], Case]] = [
    # Encoder, router and language model of the 7B; a group of heads that eight devices do not divide; short and odd.
    *(
        functools.partial(attending, *each, dtype=dtype)
        for dtype in ("bfloat16", "float32")
        for each in (
            (577, (16, 16), 64, False),
            (1148, (8, 8), 512, False),
            (3413, (32, 32), 128, True),
            (1024, (32, 4), 128, True),
            (1, (32, 8), 128, True),
            (37, (3, 3), 20, True),
        )
    ),
    *(
        functools.partial(training, name, phase=phase, **settings)
        for name in ("7B", "tiny")
        for phase, settings in (
            ("grounding", {"remat": "full"}),
            ("connector", {"remat": "full"}),
            ("multi_granularity", {"remat": "full"}),
            ("multi_granularity", {"remat": "dots"}),
            ("multi_granularity", {"remat": "none"}),
            ("multi_granularity", {"remat": "full", "optimizer.accumulate": 2}),
            ("rglf", {}),
            ("rglf", {"optimizer.accumulate": 2}),
            ("rglf", {"rglf.execution": "vmap"}),
        )
    ),
    functools.partial(training, "tiny", phase="multi_granularity", compute_dtype="bfloat16"),
    *(
        functools.partial(training, name, beside=True, phase=phase)
        for name in ("7B", "tiny")
        for phase in ("multi_granularity", "rglf")
    ),
    functools.partial(answering, "7B", "bfloat16"),
    functools.partial(answering, "tiny", "float32"),
    functools.partial(answering, "tiny", "bfloat16"),
]
"""What is compiled, each made only when it is its turn."""

LONG = 512
"""Sequences from this length on are looked for scores."""


def judge(program: Program, target: Target, mesh: Mapping[str, int], heads: Mapping[int, int]) -> dict[str, Any]:
    """Compile a program: its cost, and `faults`, the rules that it breaks, one line each.

    It must fit. What is donated must be overwritten. No score of a whole sequence by itself may be written to memory,
    (B, Q, S, S), for sequences of `LONG` or more. Of a program with a cache no copy of a layer's keys may be written.
    Where parameters lie whole (no fsdp), no program may gather a tenth of them, unless into the pool, which lies whole
    as well. Of one with a loop over tokens, temporaries must be at most a tenth of the cache and `WORKSPACE`; a token
    may move 1.1 times parameters and cache. heads: as in `Case`.
    """
    import jax

    from avg_llava_jax.commands import planning
    from avg_llava_jax.parallel import costs

    begin = time.monotonic()
    made = planning.compiled(program, target)
    plan, faults = planning.cost(program, target, made), []
    arrays = costs.written(made.as_text())
    own = {length: max(1, count // mesh["tensor"]) for length, count in heads.items()}
    if plan.fits is False:
        faults.append(f"does not fit: {plan.total / 2**30:.2f} of {target.memory / 2**30:.2f} GiB")
    donated = sum(plan.held[kind] for kind in program.donated)
    aliased = made.memory_analysis().alias_size_in_bytes
    if aliased < 0.99 * donated:
        faults.append(f"overwrites {_bytes(aliased)} of {_bytes(donated)} that are donated")
    if scores := [array for array in arrays if any(_is_scores(array.shape, *each) for each in own.items())]:
        faults.append(f"scores in memory: {_largest(scores)}")
    if cache := plan.held.get("cache", 0):
        turn, once = sum(each.bytes for each in plan.moves if each.a_turn), plan.held["parameters"] + cache
        whole = mesh["fsdp"] == 1
        if whole and turn and plan.temporaries > 0.1 * cache + WORKSPACE:
            faults.append(f"temporaries are {plan.temporaries / cache:.2f} of the cache")
        if whole and turn > 1.1 * once + WORKSPACE:
            faults.append(f"a token moves {_bytes(turn)}, parameters and cache are {_bytes(once)}")
        leaves = jax.tree.leaves(program.held["cache"])
        keys = {tuple(sorted(leaf.sharding.shard_shape(leaf.shape))) for leaf in leaves}  # whatever their order
        # Of a cache of kilobytes a TPU copies all into its core's own memory, as it should.
        copied = (a for a in arrays if a.operation in COPIES and a.size > 2**20)
        if copies := [a for a in copied if tuple(sorted(a.shape)) in keys]:
            faults.append(f"copies of the cache: {len(copies)}, {_largest(copies)}")
    parameters = sum(plan.held.get(kind, 0) for kind in ("parameters", "trained", "frozen"))
    gathered = plan.traffic.get("all-gather", costs.Traffic()).sent
    gathered -= plan.held["pool"] if "pool" in program.donated else 0
    if mesh["fsdp"] == 1 and ("cache" in plan.held or mesh["tensor"] == 1) and gathered > max(0.1 * parameters, 2**20):
        faults.append(f"gathers {_bytes(gathered)} where {_bytes(parameters)} of parameters are whole")
    return {
        "seconds": time.monotonic() - begin,
        "total": plan.total,
        "temporaries": plan.temporaries,
        "moved": sum(each.bytes for each in plan.moves),
        "held": plan.held,
        "sent": {kind: each.sent for kind, each in plan.traffic.items()},
        "faults": faults,
    }


WORKSPACE = 2**25
"""Bytes of temporaries that products need on a GPU, however small they are."""

COPIES = ("copy", "copy-start", "transpose")


def _is_scores(shape: tuple[int, ...], length: int, heads: int) -> bool:
    """Whether an array holds a score per pair of positions and head: two axes of `length`, maybe padded for a kernel.

    A block of 256 queries of 4 heads may have such a shape for 1024 positions, but is smaller.
    """
    padded = {-(-length // block) * block for block in (1, 2, 8, 64)}
    whole = math.prod(shape) >= heads * length**2
    return length >= LONG and len(shape) > 2 and sum(size in padded for size in shape) >= 2 and whole


def _largest(arrays: list[Any]) -> str:
    largest = max(arrays, key=lambda array: array.size)
    return f"{largest}, {_bytes(largest.size)}"


def _bytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"


def _shape(model: ModelConfig, sizes: dict[str, int]) -> Shape:
    from avg_llava_jax.commands import planning

    return planning.largest_shape(model, **sizes)


def _heads(model: ModelConfig, shape: Shape) -> dict[int, int]:
    """Query heads by length of a sequence: of the encoder, of the router, of each granularity."""
    own = {shape.length(model, g): model.language.heads for g in model.granularities}
    rows = model.pyramid_rows + model.router.text_tokens
    return own | {model.vision.grid**2 + 1: model.vision.heads, rows: model.router.heads}


def child(where: str) -> None:
    """Compile the missing cases of a target; prints `begin NAME` before each and `end JSON` after it."""
    import jax

    from avg_llava_jax.commands import planning
    from avg_llava_jax.parallel import chips, sharding

    topology, _, mesh = where.partition("/")
    sizes = sharding.read_sizes(mesh or "fsdp=1")
    target = chips.target(topology)
    for lazy in CASES:
        case = lazy()
        if not re.search(ONLY.value, case.name) or _file(where, case.name).exists():
            continue
        print(f"begin {case.name}", flush=True)
        found = {}
        try:
            for program in case.make(target, sizes):
                name = f"{case.name} {program.name}".strip()
                try:
                    found[name] = judge(program, target, sizes, case.heads)
                except jax.errors.JaxRuntimeError as error:
                    large = "does not fit: " if planning.too_large(error) else ""
                    found[name] = {"faults": [large + _first_line(error)]}
        except Exception as error:  # whatever a trace can raise is a line of the table
            found[case.name] = {"faults": [_first_line(error)]}
        print(f"end {json.dumps(found)}", flush=True)


def _first_line(error: Exception) -> str:
    """What went wrong: its first line, or that of the error in Python which XLA ran into and quotes."""
    text = str(error).strip()
    inner = re.search(r"^\w+(?:Error|Exception): .*", text, re.MULTILINE) if "Traceback" in text else None
    first = inner[0] if inner else f"{type(error).__name__}: {text.partition(chr(10))[0]}"
    return first[:300]


def compile_all(where: str) -> None:
    """Run child processes until all cases of a target are done; a crash is a fault of the case it happened in."""
    from avg_llava_jax.files import write_json

    _file(where, "").parent.mkdir(parents=True, exist_ok=True)
    while True:
        command = [sys.executable, "-m", "launch.bench.compile_matrix", f"--child={where}", f"--cases={ONLY.value}"]
        command.append(f"--known={WORKDIR.value}")
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        lines: queue.Queue[str | None] = queue.Queue()
        errors: list[str] = []
        readers = [
            threading.Thread(target=_read, args=(running.stdout, lines.put), daemon=True),
            threading.Thread(target=_read, args=(running.stderr, errors.append), daemon=True),
        ]
        for reader in readers:
            reader.start()
        case, fault = "", ""
        try:
            while (line := lines.get(timeout=LIMIT.value)) is not None:
                kind, _, rest = line.rstrip("\n").partition(" ")
                if kind == "begin":
                    case, began = rest, time.monotonic()
                    print(f"{time.strftime('%H:%M:%S')} {where}: {case}", file=sys.stderr, flush=True)
                elif kind == "end":
                    write_json(_file(where, case), json.loads(rest))
                    print(f"  took {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
                    case = ""
        except queue.Empty:
            fault = f"not compiled after {LIMIT.value:.0f} s"
            running.kill()
        code = running.wait()
        if not fault and code == 0:
            return
        if not case:
            said = [line for line in errors if line and line.startswith("error: ")]
            raise ValueError("".join(said[-1:]).removeprefix("error: ").strip() or f"{where}: exit code {code}")
        fault = fault or f"the compiler ended the process: {f'signal {-code}' if code < 0 else f'exit code {code}'}"
        write_json(_file(where, case), {case: {"faults": [fault]}})
        print(f"  {fault}", file=sys.stderr, flush=True)


def _read(stream: Any, put: Callable[[str | None], None]) -> None:
    for line in stream:
        put(line)
    put(None)


def _file(where: str, case: str) -> pathlib.Path:
    """Below a folder of this code's own: other programs' results are not reused."""
    return pathlib.Path(WORKDIR.value) / reuse.programs(__file__) / _name(where) / f"{_name(case)}.json"


def _name(text: str) -> str:
    return re.sub(r"[^\w.=]+", "-", text)


def known() -> dict[str, dict[str, dict[str, Any]]]:
    """The results by target and program, in the order of --target and `CASES`."""
    cases = [lazy().name for lazy in CASES]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for where in CHOSEN.value:
        files = [_file(where, case) for case in cases if re.search(ONLY.value, case)]
        found[where] = {}
        for file in files:
            if file.is_file():
                found[where] |= json.loads(file.read_text(encoding="utf-8"))
    return found


def tables(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Tables of GiB per device by program and target, or the number of a fault, and the list of faults."""
    programs = list(dict.fromkeys(name for programs in found.values() for name in programs))
    faults: list[str] = []

    def cell(entry: dict[str, Any] | None) -> str:
        if entry is None:
            return ""
        size = f"{entry['total'] / 2**30:.2f}" if entry.get("total") is not None else "**no**"
        numbers = []
        for fault in entry["faults"]:
            if fault not in faults:
                faults.append(fault)
            numbers.append(faults.index(fault) + 1)
        return size + "".join(f" ({number})" for number in numbers)

    lines = ["| GiB a device | " + " | ".join(found) + " |", "|---|" + "---:|" * len(found)]
    lines += [
        f"| {program} | " + " | ".join(cell(found[where].get(program)) for where in found) + " |"
        for program in programs
    ]
    lines += ["", *(f"{number}. {fault}" for number, fault in enumerate(faults, 1))]
    whole = [entry for programs in found.values() for entry in programs.values()]
    passed = sum(not entry["faults"] for entry in whole)
    return "\n".join([*lines, "", f"{passed} of {len(whole)} pass.", ""])


def main() -> None:
    from avg_llava_jax.files import around, write_whole

    if CHILD.value:
        child(CHILD.value)
        return
    if DOCUMENT.value:
        around(DOCUMENT.value, BEGIN, END)  # fails now rather than after the first target
    print(f"{sum(map(len, known().values()))} results of the same code are known", file=sys.stderr, flush=True)
    for where in CHOSEN.value:
        compile_all(where)
        if DOCUMENT.value:
            before, after = around(DOCUMENT.value, BEGIN, END)  # which others may have edited by now
            write_whole(DOCUMENT.value, before + tables(known()) + after)
    found = known()
    print(tables(found))
    if any(entry["faults"] for programs in found.values() for entry in programs.values()):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, required=[], model_flags=())
