"""Costs: the FLOPs of a step by formula, and the FLOPs, memory traffic and collectives of a program by its text.

`step_flops` is the reference for efficiency: the matrix products of the model, whatever else a program does.
`flops` counts a traced program; `accesses` and `collectives` count a compiled one. XLA's `cost_analysis` counts a
loop's body once; here a `lax.scan` counts as often as it runs, and a loop whose length only the device knows
(generation) counts once.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from avg_llava_jax.config import LanguageConfig, ModelConfig
from avg_llava_jax.data.packing import Shape


def encoder_flops(config: ModelConfig, tiles: int) -> int:
    """FLOPs of a forward pass of encoder and connector over `tiles` tiles: 2 x M x N x K of every product."""
    vision, patches, width = config.vision, config.vision.grid**2, config.language.width
    layer = 2 * vision.width * (4 * vision.width + 2 * vision.mlp_width)  # per token
    positions = patches + (vision.encoder == "clip")  # the class token
    attention = 4 * positions**2 * vision.width
    connector = 2 * width * (vision.width + width)  # per patch
    layers = vision.used_layers * (layer * positions + attention)
    return tiles * (layers + patches * (2 * _pixels(config) * vision.width + connector))


def language_flops(language: LanguageConfig, rows: int, length: int, answer: int, reach: int | None = None) -> int:
    """FLOPs of a forward pass over sequences (rows, length) with logits at `answer` positions of each.

    Twice the layers' parameters per token, twice the unembedding's per answer token, and attention's two products over
    all pairs of positions, causally masked ones included, as is the convention (PaLM, appendix B). reach: the length of
    the longest of the samples that share a row, the most keys that a position attends to.

    With width 1, one layer, one head of size 1, MLP width 1, vocabulary 3, rows 1, length 2, answer 1:
    2*(4 + 3)*2 + 2*3 + 4*2*2 = 50.
    """
    inner, shared = language.heads * language.head_dim, language.kv_heads * language.head_dim
    layer = language.width * (2 * inner + 2 * shared + 3 * language.mlp_width)
    attention = 4 * length * min(length, reach or length) * inner
    a_row = language.layers * (2 * layer * length + attention) + 2 * language.width * language.vocab_size * answer
    return rows * a_row


def router_flops(config: ModelConfig, rows: int, tiles: int) -> int:
    """FLOPs of a forward pass of the router over `rows` samples of `tiles` tiles each."""
    width, router = config.language.width, config.router
    tokens = config.pyramid_rows + router.text_tokens  # of a tile
    products = 2 * tokens * width * (7 * width + len(config.granularities))
    seen = tokens if router.attention == "tokens" else tiles  # keys that each token attends to
    return rows * tiles * (products + 4 * tokens * seen * width)


def step_flops(
    config: ModelConfig, phase: str, granularities: Sequence[int], rows: int, shape: Shape
) -> dict[str, int]:
    """FLOPs of one training step over `rows` samples of a shape, by part; phase `multi_granularity` or `rglf`.

    A trained part costs three times its forward pass: the backward pass has two products for each, less those whose
    input needs no gradient (pixels into the encoder, the pyramid into the router). Rematerialisation is not counted.
    """
    learns = phase != "rglf"
    times, tiles = 3 if learns else 1, rows * shape.tiles
    first = 2 * tiles * config.vision.grid**2 * _pixels(config) * config.vision.width
    parts = {"encode": times * encoder_flops(config, tiles) - (first if learns else 0)}
    for granularity in granularities:
        length = shape.length(config, granularity)
        reach = shape.longest[config.granularities.index(granularity)] if shape.samples > 1 else None
        parts[f"LMM {granularity}"] = times * language_flops(config.language, rows, length, shape.answer, reach)
    if not learns:
        qkv = 2 * tiles * (config.pyramid_rows + config.router.text_tokens) * 3 * config.language.width**2
        parts["router"] = 3 * router_flops(config, rows, shape.tiles) - qkv
    return parts


def _pixels(config: ModelConfig) -> int:
    """Values of one patch: 3 x p x p."""
    return 3 * config.vision.patch_size**2


def flops(jaxpr: core.Jaxpr) -> float:
    """FLOPs of all matrix products of a trace, over all devices: 2 x M x N x K each.

    `jax.make_jaxpr(f)(*args).jaxpr` of a scan of length 3 over products (4, 5) @ (5, 6) has 3 * 2*4*5*6 = 720.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        params = equation.params
        inner = sum(flops(each) for each in _inner(params.values()))
        match equation.primitive.name:
            case "dot_general":
                (contracted, _), _ = params["dimension_numbers"]
                left = equation.invars[0].aval.shape
                total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
            case "scan":
                total += params["length"] * inner
            case "cond":
                total += max(flops(branch.jaxpr) for branch in params["branches"])
            case "shard_map":  # traced for one of the devices
                taken = params.get("newly_manual_axes", params.get("manual_axes"))  # depends on JAX's version
                total += math.prod(params["mesh"].shape[axis] for axis in taken) * inner
            case "pallas_call":  # traced for one cell of the grid
                total += math.prod(params["grid_mapping"].grid) * inner
            case _:
                total += inner
    return total


def _inner(values: Any) -> Iterator[core.Jaxpr]:
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _inner(value)


KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16} | {f"{kind}{bits}": bits for kind in "suf" for bits in (8, 16, 32, 64)}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations)=\{?%?([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_TO_THE_CORE = re.compile(r"\(\w+\[[\d,]*\]\{[^}]*S\(1\)")
_GROUPS = re.compile(
    r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\}|mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{(.*?)\})"
)
_SIZES = re.compile(r"'(\w+)'=(\d+)")
_AXES = re.compile(r"'(\w+)'(?::\(\d+\)(\d+))?")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_NUMBER = re.compile(r"%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
_ELEMENT = re.compile(r"%?([\w.\-]+) = [su]32\[\]\S* get-tuple-element\(.*index=(\d+)")
_BELOW = re.compile(r"^ROOT .* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT")
_RESULT = re.compile(r"^ROOT .* tuple\((.*?)\)")
_SUM = re.compile(r"%?([\w.\-]+) = [su]32\[\]\S* add\((.*?)\)")

# XLA's names on TPUs for a collective in flight, and for its end.
GOES_ON, ENDS = "async_collective_fusion", "%async-collective-done"

# XLA's name on TPUs for a reduce-scatter: a fusion of an all-reduce and of the slice that is kept.
SCATTERED = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The traffic of one kind of collective in one run of a program.

    count: operations that run. sent: bytes that each device sends, over a ring: (n-1)/n of the whole array for
    gathering and scattering among n devices, twice that for an all-reduce.
    """

    count: int = 0
    sent: float = 0.0


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that one instruction of a compiled program writes to memory, on each device."""

    operation: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> float:
        """Bytes."""
        return math.prod(self.shape) * BITS[self.dtype] / 8

    def __str__(self) -> str:
        return f"{self.operation} {self.dtype}[{','.join(map(str, self.shape))}]"


NOT_WRITTEN = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "constant"}
"""Operations that write nothing: their results are arrays of other operations."""


def written(hlo: str) -> list[Array]:
    """The arrays that a compiled program, `compiled.as_text()`, writes to memory; not those inside fusions.

    The body of a loop counts once. A `-start` counts, its `-done` does not; of a `copy-start` its target alone, and not
    where that is a TPU core's own memory.
    """
    computations, _ = _computations(hlo)
    fused = {name for lines in computations.values() for line in lines if " fusion(" in line for name in _calls(line)}
    found = []
    for name in computations.keys() - fused:
        for line in computations[name]:
            parts = _INSTRUCTION.match(line)
            if parts and parts[2] not in NOT_WRITTEN and not parts[2].endswith("-done"):
                arrays = _ARRAY.findall(parts[1])
                if parts[2] == "copy-start":  # (target, source, context)
                    arrays = [] if _TO_THE_CORE.match(parts[1]) else arrays[:1]
                found += [
                    Array(parts[2], dtype, tuple(map(int, filter(None, shape.split(",")))))
                    for dtype, shape in arrays
                    if dtype in BITS
                ]
    return found


@dataclasses.dataclass(frozen=True)
class Access:
    """The memory traffic of one instruction of a compiled program, between a device's memory and its cores.

    operation: HLO's name. source: the part of the model that it comes from. times: runs, with the loops around it.
    read, written: bytes per run. a_turn: it is in a loop whose length only the device knows (generation), which counts
    once.
    """

    operation: str
    source: str
    times: int
    read: float
    written: float
    a_turn: bool = False

    @property
    def bytes(self) -> float:
        return self.times * (self.read + self.written)


class _Line(NamedTuple):
    """An instruction: its name, type of its result, operation, names of its operands, and the rest of the line."""

    name: str
    result: str
    operation: str
    operands: tuple[str, ...]
    rest: str
    root: bool


def accesses(hlo: str) -> list[Access]:
    """The memory traffic of a compiled program, `compiled.as_text()`, by instruction.

    A fusion reads each operand once; an operand that it only slices or gathers from counts by the slice. An in-place
    update reads and writes the updated part. Arrays in a core's own memory (S(1) and so on in their layout) count
    nothing. A loop whose length only the device knows counts once.
    """
    texts, entry = _computations(hlo)
    lines = {name: [found for text in body if (found := _parsed(text))] for name, body in texts.items()}
    types = {name: {line.name: line.result for line in body} for name, body in lines.items()}
    found: list[Access] = []

    def of_parameter(body: str, number: int) -> float:
        """Bytes that a fused computation reads of one of its parameters."""
        name = next(line.name for line in lines[body] if line.operation == "parameter" and line.rest == str(number))
        return of_value(body, name)

    def of_value(body: str, name: str) -> float:
        whole, total = _in_memory(types[body][name]), 0.0
        for line in lines[body]:
            if name not in line.operands:
                continue
            first = line.operands[0] == name
            if line.operation in ("dynamic-slice", "slice", "gather") and first:
                total += _size(line.result)
            elif line.operation in ("dynamic-update-slice", "scatter") and first:
                total += 0.0
            elif line.operation in ("bitcast", "reshape", "get-tuple-element"):
                total += of_value(body, line.name)
            elif line.operation == "fusion":
                inner = next(iter(_calls(line.rest)))
                total += sum(of_parameter(inner, at) for at, each in enumerate(line.operands) if each == name)
            elif line.operation == "tuple" and line.root:
                total += 0.0
            else:
                return whole
        return min(total, whole)

    def of_result(body: str, name: str, result: str) -> float:
        """Bytes that a fused computation writes of a value that it returns."""
        line = next(line for line in lines[body] if line.name == name)
        match line.operation:
            case "tuple":
                parts = _elements(result)
                return sum(of_result(body, each, kind) for each, kind in zip(line.operands, parts, strict=True))
            case "dynamic-update-slice":
                return min(_size(types[body][line.operands[1]]), _in_memory(result))
            case "scatter":
                return min(_size(types[body][line.operands[-1]]), _in_memory(result))
            case "bitcast" | "reshape":
                return of_result(body, line.operands[0], result)
            case "parameter":
                return 0.0
        return _in_memory(result)

    def walk(body: str, times: int, a_turn: bool) -> None:
        for line in lines.get(body, ()):
            operation, read, written = line.operation, 0.0, 0.0
            if operation == "while":
                turns = _trips(line.rest, texts)
                walk(_LOOP.search(line.rest)[2], times * (turns or 1), a_turn or not turns)
                continue
            if operation in ("call", "conditional"):
                for name in _BRANCHES.findall(line.rest):
                    walk(name, times, a_turn)
                continue
            if operation in NOT_WRITTEN or operation.endswith(("-done", "-update")):
                continue
            result = line.result
            if operation.endswith("-start") and operation != "all-reduce-start":
                result = _elements(result)[operation != "copy-start"]  # copy-start puts the result first
            sizes = [_in_memory(types[body].get(name, "")) for name in line.operands]
            if operation == "fusion":
                inner = next(iter(_calls(line.rest)))
                read = sum(of_parameter(inner, at) for at, size in enumerate(sizes) if size)
                written = of_result(inner, next(each.name for each in lines[inner] if each.root), result)
            elif operation in ("dynamic-slice", "slice", "gather"):
                read = written = _in_memory(result)
            elif operation in ("dynamic-update-slice", "scatter"):
                read = written = sizes[1 if operation == "dynamic-update-slice" else -1]
            else:
                read, written = sum(sizes), _in_memory(_WORKSPACE.sub("", result))
            if read or written:
                source = _SOURCE.search(line.rest)
                found.append(Access(operation, source[1] if source else line.name, times, read, written, a_turn))

    walk(entry, 1, False)
    return found


_OPERANDS = re.compile(r"%([\w.\-]+)")
_PARSED = re.compile(r"^(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")
_SOURCE = re.compile(r'op_name="([^"]*)"')
_LAID_OUT = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_BRANCHES = re.compile(r"(?:to_apply=|_computation=|branch_computations=\{|, )%([\w.\-]+)(?=[,}]|$)")
_WORKSPACE = re.compile(r", s8\[\d+\](\{0\})?(?=\)$)")


def _parsed(text: str) -> _Line | None:
    found = _PARSED.match(text)
    if not found:
        return None
    root, name, result, operation, rest = found.groups()
    depth, end = 1, len(rest)
    for at, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            end = at
            break
    inside = rest[:end]
    if operation == "parameter":
        return _Line(name, result, operation, (), inside, bool(root))
    return _Line(name, result, operation, tuple(_OPERANDS.findall(inside)), rest[end:], bool(root))


def _size(kind: str) -> float:
    """Bytes of the arrays in a type."""
    return sum(
        math.prod(map(int, filter(None, shape.split(",")))) * BITS[dtype] / 8
        for dtype, shape in _ARRAY.findall(kind)
        if dtype in BITS
    )


def _in_memory(kind: str) -> float:
    """Bytes of those arrays in a type that lie in the device's main memory."""
    return sum(
        _size(f"{dtype}[{shape}]")
        for dtype, shape, layout in _LAID_OUT.findall(kind)
        if dtype in BITS and "S(" not in layout
    )


def _calls(line: str) -> list[str]:
    return re.findall(r"calls=%?([\w.\-]+)", line)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        if found := _COMPUTATION.match(line):
            lines = computations.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        else:
            lines.append(line.strip())
    return computations, entry


def collectives(hlo: str) -> dict[str, Traffic]:
    """Traffic of each kind of collective in a compiled program, `compiled.as_text()`; loops count by their trip count.

    On a TPU a collective that overlaps with products appears in the fusion that starts it, where it counts, in those
    that run meanwhile, and in the one that ends it.
    """
    computations, entry = _computations(hlo)
    known: dict[str, dict[str, Traffic]] = {}

    def of(name: str) -> dict[str, Traffic]:
        if name not in known:
            inside = () if name.startswith(GOES_ON) else computations.get(name, ())
            known[name] = _total(_traffic(line, of, computations) for line in inside)
            if name.startswith(SCATTERED) and "all-reduce" in known[name]:
                both = known[name]["all-reduce"]
                known[name] = {"reduce-scatter": Traffic(both.count, both.sent / 2)}
        return known[name]

    return of(entry)


def _traffic(line: str, of: Any, computations: Mapping[str, list[str]]) -> Mapping[str, Traffic]:
    found = _INSTRUCTION.match(line)
    if not found or line.removeprefix("ROOT ").startswith(ENDS):
        return {}
    result, operation, rest = found.groups()
    kind = operation.removesuffix("-start")
    if kind in KINDS:
        return {kind: Traffic(1, _sent(kind, result, rest, operation != kind))}
    if operation.endswith("-done") or operation.endswith("-update"):
        return {}
    times = _trips(rest, computations) or 1 if operation == "while" else 1
    called = _total(of(name) for name in _CALLED.findall(rest))
    return {kind: Traffic(times * each.count, times * each.sent) for kind, each in called.items()}


def _trips(loop: str, computations: Mapping[str, list[str]]) -> int | None:
    """The trip count of a loop: XLA's note of it, or else the limit of its counter; None if unknown.

    The counter is the element of the loop's tuple that its condition compares with a constant. It starts at 0, and the
    body adds a constant: 1, or more where XLA has unrolled the loop (products that are sent around in parts). A step
    that is not found counts as 1.
    """
    if noted := _TRIPS.search(loop):
        return int(noted[1])
    condition, body = (computations.get(name, []) for name in _LOOP.search(loop).groups())
    limits, elements = _found(_NUMBER, condition), _found(_ELEMENT, condition)
    numbers, sums = _found(_NUMBER, body), _found(_SUM, body)
    results = [name for names in _found(_RESULT, body) for name in _names(names)]
    for counter, limit in _found(_BELOW, condition).items():
        if counter in elements and limit in limits:
            added = _names(sums.get(results[int(elements[counter])], "")) if results else []
            step = next((int(numbers[name]) for name in added if name in numbers), 1)
            return -(-int(limits[limit]) // step)
    return None


def _names(operands: str) -> list[str]:
    """`%a, /*index=1*/%b` is ["a", "b"]."""
    return [re.sub(r"/\*.*?\*/|%", "", each).strip() for each in operands.split(",")]


def _found(what: re.Pattern[str], lines: Sequence[str]) -> dict[str, str]:
    """The first group of each line that matches, and the last group of the same line."""
    return {found[1]: found[found.re.groups] for line in lines if (found := what.search(line))}


def _group(rest: str) -> float:
    """The number of devices of a collective; infinite where the instruction does not say.

    [8,4]<=[32]: 8 groups of 4. {{0,1},{2,3}}: groups of 2. mesh['a'=8,'b'=4] {'b'}: along b, 4, whatever the
    device_ids=([4,8]T(1,0)) after the mesh.
    """
    found = _GROUPS.search(rest)
    if not found:
        return math.inf
    size, listed, mesh, axes = found.groups()
    if mesh:
        sizes = dict(_SIZES.findall(mesh))
        return math.prod(int(part or sizes[name]) for name, part in _AXES.findall(axes))
    return int(size or listed.count(",") + 1)


def _sent(kind: str, result: str, rest: str, started: bool) -> float:
    """Bytes that one device sends. result: the type of the instruction's result, or of its -start's.

    The type of a -start includes the operands, (operand, result), ((operands), (results)) or ((operand), result), and
    may have more elements after them; that of an all-reduce-start is the result alone.
    """
    if started and kind != "all-reduce":
        result = _elements(result)[1]
    size = _size(result)
    if kind == "collective-permute":
        return size
    devices = _group(rest)
    if kind == "reduce-scatter":
        return size * (devices - 1)
    return size * (1 - 1 / devices) * (2 if kind == "all-reduce" else 1)


def _elements(kind: str) -> list[str]:
    """The element types of a tuple type: ((f32[8]{0}), f32[8,4]{0,1}) has (f32[8]{0}) and f32[8,4]{0,1}."""
    found, depth = [""], 0
    for letter in kind[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            found.append("")
        else:
            found[-1] += letter
    return found


def _total(parts: Any) -> dict[str, Traffic]:
    total: dict[str, Traffic] = {}
    for part in parts:
        for kind, each in part.items():
            before = total.get(kind, Traffic())
            total[kind] = Traffic(before.count + each.count, before.sent + each.sent)
    return total
