"""How well a model answers at every fixed granularity, and what its router makes of that.

    a source --read_questions--> questions --answer_all--> records: answers at each granularity, router scores
    records --policies.report--> accuracy, visual tokens and shares: fixed, random, adaptive, oracle
    a few questions --timing.seconds_per_answer--> measured times, one answer after another

A record is made once. Where all images of a question get one granularity, what the adaptive, random or
oracle choice answers is the answer at that fixed granularity (answers do not depend on the batch), so it
is looked up; a question whose images get different ones is answered once more. Another router over the
same model needs `route_all` alone.

`answer_all` answers batch by batch, each of one shape; `engine.questions.answer_all` makes the same records by
continuous batching.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.conversation import PLACEHOLDER, encode_conversation, encode_prompt
from avg_llava_jax.data.errors import BadSample
from avg_llava_jax.data.packing import Sample, Shape, load_tiles, make_sample
from avg_llava_jax.data.sources import Source
from avg_llava_jax.data.tokenizer import Tokenizer
from avg_llava_jax.eval.policies import Choice, Record, choices
from avg_llava_jax.files import whole_lines
from avg_llava_jax.inference import batching, generate
from avg_llava_jax.inference.api import AvgLlava, softmax
from avg_llava_jax.inference.batching import groups
from avg_llava_jax.inference.requests import Prepared, Request
from avg_llava_jax.models.scaler import scale


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt without its answer (`sample`, which has the id and the kind), and the answer that counts as right.

    grade: how right an answer is, in [0, 1]; by default whether it equals `reference` when both are normalised.
    extra: goes into the record as it is.
    """

    sample: Sample
    text: str
    reference: str
    grade: Callable[[str], float] | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def make_question(record: dict[str, Any], tokenizer: Tokenizer, template: str) -> Question:
    """A record of a source (`id, images, conversations, kind?`) as a question: its last answer is asked for.

    Earlier turns stand in the prompt. Raises BadSample for a record that cannot be used.
    """
    turns, images = record.get("conversations"), record["images"]
    encode_conversation(turns, tokenizer, template, len(images))  # checks all of it, the answer included
    tokens = encode_prompt(turns[:-1], tokenizer, template, len(images))
    sample = make_sample(record["id"], tokens, images, record.get("kind"))
    return Question(sample, turns[-2]["value"].replace(PLACEHOLDER, "").strip(), turns[-1]["value"].strip())


def read_questions(
    source: Source, tokenizer: Tokenizer, config: ModelConfig
) -> tuple[list[Question], list[dict[str, str]]]:
    """All questions of a source, and what was skipped: `{"id", "reason", "detail"}`.

    A second record of the same id becomes `id#2`, a third `id#3`.
    """
    questions, skipped, seen = [], [], collections.Counter[str]()
    for index in range(len(source)):
        try:
            question = make_question(source[index], tokenizer, config.template)
        except BadSample as error:
            skipped.append({"id": str(index), "reason": error.reason, "detail": error.detail})
            continue
        sample = question.sample
        seen[sample.id] += 1
        if seen[sample.id] > 1:
            unique = dataclasses.replace(sample, id=f"{sample.id}#{seen[sample.id]}")
            question = dataclasses.replace(question, sample=unique)
        questions.append(question)
    return questions, skipped


def check_fits(config: ModelConfig, sample: Sample) -> None:
    """Raises BadSample `too_long` where a prompt exceeds `max_length` even at the coarsest granularity."""
    need = batching.length_at(config, sample, (config.granularities[0],) * len(sample.sizes))
    if need > config.language.max_length:
        limit = config.language.max_length
        raise BadSample("too_long", f"{need} tokens at the coarsest granularity, the model takes {limit}")


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
    skipped: list[dict[str, str]] | None = None,
) -> list[Record]:
    """Greedy answers of every question at every fixed granularity and at the router's choice.

    Each image is encoded once for all of them. With `file` (JSON lines) records are appended as they
    come, and those that are in it already are not computed again.

    A question whose image turns out to be damaged is left out and added to `skipped`; without that list it
    raises BadSample.

    Returns the records in the order of the questions: `id, kind, question, reference, answers {g: text, or
    None where the prompt does not fit}, right {g: bool or grade}, visual_tokens {g: int}, scores (images, G),
    probabilities (images, G), chosen (images,), answer (at the router's choice), adaptive {answer, right,
    visual_tokens}`, and what is `extra` of a question.
    """
    with logged(questions, file, progress, skipped) as log:
        for batch, shape in _batches(model.config, [question.sample for question in log.todo], batch_size):
            group, tiles = _with_tiles(model.config, [log.todo[row] for row in batch], log)
            for record in _answer_batch(model, group, tiles, shape, batch_size, max_new_tokens):
                log.add(record)
    return log.records()


@contextlib.contextmanager
def logged(
    questions: Sequence[Question],
    file: str | os.PathLike[str] | None,
    progress: bool,
    skipped: list[dict[str, str]] | None,
) -> Iterator[Log]:
    """A log of records that knows those in `file`, and appends to it; the arguments are those of `answer_all`."""
    if len({question.sample.id for question in questions}) < len(questions):
        raise ValueError("two questions have the same id; `read_questions` makes ids unique")
    known = {} if file is None else read_records(file)
    todo = [question for question in questions if question.sample.id not in known]
    bar = tqdm(total=len(questions), initial=len(questions) - len(todo), unit="question", disable=not progress)
    with bar, open(os.devnull if file is None else file, "a", encoding="utf-8") as sink:
        yield Log(questions, todo, known, skipped, sink, bar)


class Log:
    """Records of questions as they come: written to a file (JSON lines), and counted on a bar with the score so far.

    todo: the questions that had no record yet when it was opened.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        todo: Sequence[Question],
        known: dict[str, Record],
        skipped: list[dict[str, str]] | None,
        sink: TextIO,
        bar: tqdm,
    ):
        self.todo = todo
        self._questions, self._known, self._skipped, self._sink, self._bar = questions, known, skipped, sink, bar
        self._right = sum(record["adaptive"]["right"] for record in known.values())

    def add(self, record: Record) -> None:
        """Keep a record."""
        self._known[record["id"]] = record
        self._right += record["adaptive"]["right"]
        self._sink.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._sink.flush()
        self._bar.set_postfix_str(f"right {self._right / len(self._known):.3f}", refresh=False)
        self._bar.update()

    def skip(self, question: Question, error: BadSample) -> None:
        """Leave a question out; raises the error where nobody keeps a list of those."""
        if self._skipped is None:
            raise error
        self._skipped.append({"id": question.sample.id, "reason": error.reason, "detail": error.detail})
        self._bar.update()

    def records(self) -> list[Record]:
        """All that there are, in the order of the questions."""
        return [self._known[question.sample.id] for question in self._questions if question.sample.id in self._known]


def read_records(file: str | os.PathLike[str]) -> dict[str, Record]:
    """Records by id; a last line that was cut off by an interruption is removed from the file."""
    try:
        records = [json.loads(line) for line in whole_lines(file)]
    except ValueError as error:
        raise ValueError(f"{file} is not a file of answers ({error}); use another folder") from None
    return {record["id"]: _with_int_keys(record) for record in records}


def _with_int_keys(record: Record) -> Record:
    by_granularity = ("answers", "right", "visual_tokens")
    return record | {key: {int(g): value for g, value in record[key].items()} for key in by_granularity}


def route_all(model: AvgLlava, samples: Sequence[Sample], batch_size: int = 32) -> list[np.ndarray]:
    """Router scores (images, G) of each prompt; nothing is answered."""
    return route_seen(model, see_all(model, samples, batch_size))


def see_all(
    model: AvgLlava, samples: Sequence[Sample], batch_size: int = 32
) -> Iterator[tuple[list[int], batching.Seen]]:
    """Each prompt's images encoded, a batch at a time: row numbers and what was seen. Kept, they serve many routers."""
    for rows, shape in _batches(model.config, samples, batch_size):
        group = [samples[row] for row in rows]
        yield rows, batching.see(model.config, model.params, group, shape, batch_size, route=False)


def route_seen(model: AvgLlava, seen: Iterable[tuple[list[int], batching.Seen]]) -> list[np.ndarray]:
    """Router scores (images, G) of prompts that `see_all` has encoded, in their order.

    model: the one that saw them, or one that differs from it in its router and its ladder alone.
    """
    config, params = model.config, model.params
    scores: dict[int, np.ndarray] = {}
    for rows, batch in seen:
        if batch.inputs:
            pyramid = batch.pyramid
            if pyramid.shape[2] != config.pyramid_rows:  # another ladder: the finest rows hold all that there is
                pyramid = scale(config, pyramid[:, :, -config.granularities[-1] :])
            batch = dataclasses.replace(batch, routing=generate.route(config, params, pyramid, batch.inputs))
        scores |= {row: batch.logits(at) for at, row in enumerate(rows)}
    return [scores[row] for row in range(len(scores))]


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


def _batches(config: ModelConfig, samples: Sequence[Sample], size: int) -> Iterator[tuple[list[int], Shape]]:
    """Row numbers and the shape they are encoded in: samples of as many tiles and images, one text length for all."""
    if not samples:
        return
    shapes = [batching.prompt_shape(sample, config) for sample in samples]
    text = max(shape.text for shape in shapes)
    finest = config.granularities[-1]
    # By length, so that little is padding, and questions about one picture side by side: what they share is read once.
    cost = [sum(batching.visual_tokens(config, s, (finest,) * len(s.sizes))) for s in samples]
    pictures = batching.by_key(samples, lambda sample: tuple(image.name for image in sample.images))
    first = {row: rows[0] for rows in pictures.values() for row in rows}
    order = sorted(range(len(samples)), key=lambda row: (cost[row], first[row]))

    def together(row: int) -> tuple[int, int, bool]:
        return shapes[row].tiles, shapes[row].images, bool(samples[row].sizes)

    for places in groups(order, together, size):
        rows = [order[place] for place in places]
        yield rows, dataclasses.replace(shapes[rows[0]], text=text)


def _with_tiles(
    config: ModelConfig, questions: Sequence[Question], log: Log
) -> tuple[list[Question], list[np.ndarray]]:
    """The questions whose images can be decoded, and their tiles."""
    good: list[Question] = []
    tiles: list[np.ndarray] = []
    for question in questions:
        if good and question.sample.images == good[-1].sample.images:  # two questions about one scene
            tiles.append(tiles[-1])
        else:
            try:
                tiles.append(load_tiles(question.sample, config))
            except BadSample as error:
                log.skip(question, error)
                continue
        good.append(question)
    return good, tiles


def _answer_batch(
    model: AvgLlava,
    questions: Sequence[Question],
    tiles: Sequence[np.ndarray],
    shape: Shape,
    rows: int,
    max_new_tokens: int,
) -> Iterator[Record]:
    """Records of questions of one shape: encode once, then prefill and decode at each granularity."""
    if not questions:
        return
    config, samples = model.config, [question.sample for question in questions]
    seen = batching.see(config, model.params, samples, shape, rows, tiles)
    scores = [seen.logits(row) for row in range(len(samples))]
    chosen = choices(config, scores)
    answers: list[dict[Choice, str | None]] = [{} for _ in questions]

    def ask(picked: Sequence[Choice]) -> None:
        ids = batching.greedy(config, model.params, model.decoding, seen, picked, model.stop_ids, max_new_tokens, rows)
        for known, choice, row in zip(answers, picked, ids, strict=True):
            known.setdefault(choice, None if row is None else model.tokenizer.decode(row).strip())

    # Without images all granularities are one.
    for g in config.granularities if any(sample.sizes for sample in samples) else config.granularities[:1]:
        ask([(g,) * len(sample.sizes) for sample in samples])
    if any(len(set(choice)) > 1 for choice in chosen):
        ask(chosen)
    for question, rows_of_scores, texts in zip(questions, scores, answers, strict=True):
        yield make_record(config, question, rows_of_scores, texts)


def make_record(
    config: ModelConfig, question: Question, scores: np.ndarray, answers: Mapping[Choice, str | None]
) -> Record:
    """What `answer_all` says of a question, from router scores (images, G) and its answers by choice.

    answers: with all images at each granularity, and at the router's choice; None where the prompt does not fit.
    """
    sample, (choice,) = question.sample, choices(config, [scores])
    every = {g: (g,) * len(sample.sizes) for g in config.granularities}
    texts = {g: answers[each] for g, each in every.items()}
    return {
        "id": sample.id,
        "kind": sample.kind,
        "question": question.text,
        "reference": question.reference,
        "answers": texts,
        "right": {g: _right(text, question) for g, text in texts.items()},
        "visual_tokens": {g: sum(batching.visual_tokens(config, sample, each)) for g, each in every.items()},
        "scores": scores.tolist(),
        "probabilities": [softmax(image) for image in scores],
        "chosen": list(choice),
        "answer": answers[choice],
        **question.extra,
        "adaptive": {
            "answer": answers[choice],
            "right": _right(answers[choice], question),
            "visual_tokens": sum(batching.visual_tokens(config, sample, choice)),
        },
    }


def _right(text: str | None, question: Question) -> bool | float:
    if text is None or question.grade is None:
        return text is not None and normalise(text) == normalise(question.reference)
    return question.grade(text)


def answer_mixed(
    model: AvgLlava,
    questions: Sequence[Question],
    records: Sequence[Record],
    wanted: Sequence[Choice],
    file: str | os.PathLike[str],
    max_new_tokens: int = 16,
    batch_size: int = 32,
) -> None:
    """Answers where the images of a question get different granularities, and not those that `answer_all` saw chosen.

    questions, records, wanted: one each a question. What is new is answered and appended to `file` (JSON lines: `id,
    choice, answer, right, visual_tokens`; `answer` is None where the prompt does not fit); all of the file goes into
    the records: `record["mixed"][choice]`.
    """
    path = pathlib.Path(file)
    by_id = {record["id"]: record for record in records}
    for entry in map(json.loads, whole_lines(path)):
        if entry["id"] in by_id:
            by_id[entry["id"]].setdefault("mixed", {})[tuple(entry["choice"])] = entry
    todo: list[tuple[Question, Choice]] = [
        (question, choice)
        for question, record, choice in zip(questions, records, wanted, strict=True)
        if len(set(choice)) > 1 and list(choice) != record["chosen"] and choice not in record.get("mixed", {})
    ]
    if not todo:
        return
    request = Request("", max_new_tokens=max_new_tokens)
    with open(path, "a", encoding="utf-8") as sink:
        for at in range(0, len(todo), batch_size):
            part, config = todo[at : at + batch_size], model.config
            fitting = {
                question.sample.id: Prepared(
                    request, question.sample, batching.prompt_shape(question.sample, config), choice
                )
                for question, choice in part
                if batching.length_at(config, question.sample, choice) <= config.language.max_length
            }
            answers = dict(zip(fitting, model.answer_prepared([*fitting.values()], batch_size), strict=True))
            for question, choice in part:
                answer = answers.get(question.sample.id)
                text = None if answer is None else answer.text
                entry = {
                    "id": question.sample.id,
                    "choice": list(choice),
                    "answer": text,
                    "right": _right(text, question),
                    "visual_tokens": sum(batching.visual_tokens(config, question.sample, choice)),
                }
                by_id[question.sample.id].setdefault("mixed", {})[choice] = entry
                sink.write(json.dumps(entry, ensure_ascii=False) + "\n")
            sink.flush()
