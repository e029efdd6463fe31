"""How well a model answers at every fixed granularity, and what its router makes of that.

    Question ... --answer_all--> records, one a question: answers at each granularity, router scores
    records --report--> accuracy, visual tokens and shares: fixed, random, adaptive, oracle

A record is made once. Where all images of a question get one granularity, what the adaptive, random or
oracle choice answers is the answer at that fixed granularity (answers do not depend on the batch), so it
is looked up; a question whose images get different ones is answered once more. Another router over the
same model needs `route_all` alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import random
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from avg_llava_jax import batching, generate
from avg_llava_jax.api import AvgLlava, groups, softmax
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.conversation import PLACEHOLDER, encode_prompt
from avg_llava_jax.data.images import ImageRef
from avg_llava_jax.data.packing import Sample, Shape, load_tiles, make_sample
from avg_llava_jax.data.tokenizer import Tokenizer
from avg_llava_jax.streaming import TextStream

Record = dict[str, Any]
Choice = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt without its answer (`sample`, which has the id and the kind), and the answer that counts as right."""

    sample: Sample
    text: str
    reference: str


def make_question(record: dict[str, Any], images: Sequence[ImageRef], tokenizer: Tokenizer, template: str) -> Question:
    """A LLaVA record `{id, conversations, kind?}` as a question: its last answer is asked for.

    Earlier turns stand in the prompt. Raises BadSample for a conversation that cannot be used.
    """
    turns = record["conversations"]
    prompt, answer = turns[:-1], turns[-1]
    tokens = encode_prompt(prompt, tokenizer, template, len(images))
    sample = make_sample(str(record.get("id", "")), tokens, images, record.get("kind"))
    text = prompt[-1]["value"].replace(PLACEHOLDER, "").strip()
    return Question(sample, text, answer["value"].strip())


def normalise(text: str) -> str:
    """Lower case, without punctuation, single spaces: "The No. 7!" -> "the no 7"."""
    text = "".join(c for c in text.casefold() if not unicodedata.category(c).startswith("P"))
    return " ".join(text.split())


def answer_all(
    model: AvgLlava,
    questions: Sequence[Question],
    file: str | os.PathLike[str] | None = None,
    max_new_tokens: int = 16,
    batch_size: int = 32,
    progress: bool = True,
) -> tuple[list[Record], dict[str, Any]]:
    """Greedy answers of every question at every fixed granularity and at the router's choice.

    Each image is encoded once for all of them. With `file` (JSON lines) records are appended as they
    come, and those that are in it already are not computed again.

    Returns:
      the records in the order of the questions: `id, kind, question, reference, answers {g: text, or None
        where the prompt does not fit}, right {g: bool}, visual_tokens {g: int}, scores (images, G),
        probabilities (images, G), chosen (images,), adaptive {answer, right, visual_tokens}`;
      seconds of an answer in this batch size, compilation left out: {"fixed": {g: ...}, "adaptive": ...},
        None where nothing was computed.
    """
    _unique(questions)
    known = {} if file is None else read_records(file)
    todo = [question for question in questions if question.sample.id not in known]
    clock = _Clock(model.config)
    bar = tqdm(total=len(questions), initial=len(questions) - len(todo), unit="question", disable=not progress)
    with bar, open(file, "a", encoding="utf-8") if file is not None else open(os.devnull, "w") as sink:
        for batch, shape in _batches(model.config, [question.sample for question in todo], batch_size):
            group = [todo[row] for row in batch]
            for record in _answer_batch(model, group, shape, batch_size, max_new_tokens, clock):
                known[record["id"]] = record
                sink.write(json.dumps(record, ensure_ascii=False) + "\n")
            sink.flush()
            bar.update(len(group))
    return [known[question.sample.id] for question in questions], clock.seconds()


def read_records(file: str | os.PathLike[str]) -> dict[str, Record]:
    """Records by id; a last line that was cut off by an interruption is removed from the file."""
    path = pathlib.Path(file)
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines = lines[:-1]
        path.write_text("".join(lines), encoding="utf-8")
    try:
        records = [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} is not a file of answers ({error}); use another folder") from None
    return {record["id"]: _with_int_keys(record) for record in records}


def _with_int_keys(record: Record) -> Record:
    by_granularity = ("answers", "right", "visual_tokens")
    return record | {key: {int(g): value for g, value in record[key].items()} for key in by_granularity}


def route_all(model: AvgLlava, samples: Sequence[Sample], batch_size: int = 32) -> list[np.ndarray]:
    """Router scores (images, G) of each prompt; nothing is answered."""
    scores: list[np.ndarray] = [np.zeros((0, 0))] * len(samples)
    for rows, shape in _batches(model.config, samples, batch_size):
        seen = batching.see(model.config, model.params, [samples[row] for row in rows], shape, batch_size)
        for at, row in enumerate(rows):
            scores[row] = seen.logits(at)
    return scores


def shuffled(questions: Sequence[Question], what: str, seed: int = 0) -> list[Sample]:
    """What the router is shown in a control: another question's instruction, or another's image.

    Every question is paired with another one of as many images, and in the seeded order never with
    itself where there are two. what: "instruction" or "image".
    """
    if what not in ("instruction", "image"):
        raise ValueError(f"shuffled {what!r}: choose instruction or image")
    samples = [question.sample for question in questions]
    mixed = list(samples)
    for rows in groups(samples, lambda sample: len(sample.sizes), len(samples)):
        order = random.Random(seed).sample(rows, len(rows))
        for row, other in zip(order, order[1:] + order[:1], strict=True):
            one, two = (samples[row], samples[other]) if what == "instruction" else (samples[other], samples[row])
            mixed[row] = dataclasses.replace(one, tokens=two.tokens)
    return mixed


def choices(config: ModelConfig, scores: Sequence[np.ndarray]) -> list[Choice]:
    """The router's argmax for each image of each question, the first of a tie."""
    return [tuple(config.granularities[int(np.argmax(row))] for row in rows) for rows in scores]


def random_choices(config: ModelConfig, records: Sequence[Record], seed: int = 0) -> list[Choice]:
    """One seeded random granularity a question, for all of its images."""
    rng = random.Random(seed)
    drawn = [rng.choice(config.granularities) for _ in records]
    return [(g,) * len(record["chosen"]) for g, record in zip(drawn, records, strict=True)]


def oracle_choices(config: ModelConfig, records: Sequence[Record]) -> list[Choice]:
    """The cheapest granularity whose answer is right, else the cheapest."""
    picked = [next((g for g in config.granularities if r["right"][g]), config.granularities[0]) for r in records]
    return [(g,) * len(record["chosen"]) for g, record in zip(picked, records, strict=True)]


def outcome(config: ModelConfig, records: Sequence[Record], picked: Sequence[Choice]) -> dict[str, Any]:
    """Accuracy, mean visual tokens (all, and by kind) and the share of each granularity by kind.

    For `picked[i]`, the granularities of question i's images. Images that get different ones are known
    only where the router of `answer_all` chose them: ValueError otherwise.
    """
    right, cost, chosen = [], [], []
    for record, choice in zip(records, picked, strict=True):
        if len(set(choice)) > 1:
            if list(choice) != record["chosen"]:
                raise ValueError(f"question {record['id']} was never answered at granularities {list(choice)}")
            right.append(record["adaptive"]["right"])
            cost.append(record["adaptive"]["visual_tokens"])
        else:
            granularity = choice[0] if choice else config.granularities[0]
            right.append(record["right"][granularity])
            cost.append(record["visual_tokens"][granularity])
        chosen.append(choice)
    kinds = _kinds(records)
    shares = {}
    for kind, rows in kinds.items():
        of_kind = [g for row in rows for g in chosen[row]]
        shares[kind] = {str(g): of_kind.count(g) / max(1, len(of_kind)) for g in config.granularities}
    tokens = {kind: float(np.mean([cost[row] for row in rows])) for kind, rows in kinds.items()}
    return {
        "accuracy": {kind: float(np.mean([right[row] for row in rows])) for kind, rows in kinds.items()},
        "visual_tokens": tokens["all"],
        "visual_tokens_by_kind": tokens,
        "chosen": shares,
    }


def report(
    config: ModelConfig,
    records: Sequence[Record],
    seconds: dict[str, Any] | None = None,
    adaptive: Sequence[Choice] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The comparison as report.json holds it; granularities are strings, shares and accuracies in [0, 1].

    adaptive: the choices to call adaptive; default what the router chose in `answer_all`.
    """
    if not records:
        raise ValueError("there is no question to report on")
    adaptive = [tuple(record["chosen"]) for record in records] if adaptive is None else adaptive
    fixed = {
        str(g): outcome(config, records, [(g,) * len(record["chosen"]) for record in records])
        for g in config.granularities
    }
    rest = {
        "random": outcome(config, records, random_choices(config, records, seed)),
        "adaptive": outcome(config, records, adaptive),
        "oracle": outcome(config, records, oracle_choices(config, records)),
    }

    def both(key: str) -> dict[str, Any]:
        return {"fixed": {g: part[key] for g, part in fixed.items()}} | {name: part[key] for name, part in rest.items()}

    chosen = rest["adaptive"]["chosen"]
    return {
        "accuracy": both("accuracy"),
        "visual_tokens": both("visual_tokens"),
        "visual_tokens_by_kind": both("visual_tokens_by_kind"),
        "chosen": chosen,
        "seconds": {"answer": seconds},
        "n": len(records),
        "n_by_kind": {kind: len(rows) for kind, rows in _kinds(records).items()},
    }


def _kinds(records: Sequence[Record]) -> dict[str, list[int]]:
    """Row numbers of each kind in order of appearance, and of all."""
    kinds: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        if record["kind"] is not None:
            kinds.setdefault(record["kind"], []).append(row)
    return kinds | {"all": list(range(len(records)))}


def _unique(questions: Sequence[Question]) -> None:
    ids = set()
    for question in questions:
        if question.sample.id in ids:
            raise ValueError(f"two questions have the id {question.sample.id!r}; ids must be unique")
        ids.add(question.sample.id)


def _batches(config: ModelConfig, samples: Sequence[Sample], size: int) -> Iterator[tuple[list[int], Shape]]:
    """Row numbers and the shape they are encoded in: samples of as many tiles and images, one text length for all."""
    if not samples:
        return
    shapes = [batching.prompt_shape(sample, config) for sample in samples]
    text = max(shape.text for shape in shapes)
    for rows in groups(samples, lambda sample: _tiles_of(config, sample), size):
        yield rows, dataclasses.replace(shapes[rows[0]], text=text)


def _tiles_of(config: ModelConfig, sample: Sample) -> tuple[int, int, bool]:
    shape = batching.prompt_shape(sample, config)
    return shape.tiles, shape.images, bool(sample.sizes)


def _answer_batch(
    model: AvgLlava, questions: Sequence[Question], shape: Shape, rows: int, room: int, clock: _Clock
) -> Iterator[Record]:
    """Records of questions of one shape: encode once, then prefill and decode at each granularity."""
    config, samples = model.config, [question.sample for question in questions]
    # One scene may be asked about twice; it is decoded and cut into tiles once.
    tiles = {sample.images: load_tiles(sample, config) for sample in {s.images: s for s in samples}.values()}
    begin = time.perf_counter()
    seen = batching.see(config, model.params, samples, shape, rows, [tiles[sample.images] for sample in samples])
    jax.block_until_ready(seen.pyramid)
    clock.add("see", (shape, rows), time.perf_counter() - begin, len(samples))
    scores = [seen.logits(row) for row in range(len(samples))]
    chosen = choices(config, scores)

    answers: dict[int, list[str | None]] = {}
    for g in config.granularities:
        if g != config.granularities[0] and seen.routing is None:
            answers[g] = answers[config.granularities[0]]  # without images all granularities are one
            continue
        picked = [(g,) * len(sample.sizes) for sample in samples]
        answers[g] = _greedy(model, seen, picked, rows, room, lambda *event, g=g: clock.add(g, *event))
    mixed = [row for row, choice in enumerate(chosen) if len(set(choice)) > 1]
    adaptive = [answers[choice[0] if choice else config.granularities[0]][row] for row, choice in enumerate(chosen)]
    if mixed:
        extra = _greedy(model, seen, chosen, rows, room, None)
        adaptive = [extra[row] if row in mixed else answer for row, answer in enumerate(adaptive)]

    for row, question in enumerate(questions):
        sample, reference = question.sample, normalise(question.reference)
        clock.chose(chosen[row])

        def right(text: str | None, reference: str = reference) -> bool:
            return text is not None and normalise(text) == reference

        cost = {
            g: sum(batching.visual_tokens(config, sample, (g,) * len(sample.sizes))) for g in config.granularities
        }
        yield {
            "id": sample.id,
            "kind": sample.kind,
            "question": question.text,
            "reference": question.reference,
            "answers": {g: answers[g][row] for g in config.granularities},
            "right": {g: right(answers[g][row]) for g in config.granularities},
            "visual_tokens": cost,
            "scores": scores[row].tolist(),
            "probabilities": [softmax(image) for image in scores[row]],
            "chosen": list(chosen[row]),
            "adaptive": {
                "answer": adaptive[row],
                "right": right(adaptive[row]),
                "visual_tokens": sum(batching.visual_tokens(config, sample, chosen[row])),
            },
        }
