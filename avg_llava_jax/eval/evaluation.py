"""Evaluation of a model at every fixed granularity and at its router's choice.

    a source --read_questions--> questions --answer_all--> records: answers at each granularity, router scores
    records --policies.report--> accuracy, visual tokens and shares: fixed, random, adaptive, oracle
    a few questions --timing.seconds_per_answer--> measured seconds, one answer at a time

Answers do not depend on what else is running, so each question is answered once per granularity, and the adaptive,
random and oracle policies look their answers up. Only a question whose images get different granularities is answered
again. Another router over the same model needs only `routing`.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from avg_llava_jax import reuse
from avg_llava_jax.config import ModelConfig, named
from avg_llava_jax.data.conversation import PLACEHOLDER, encode_conversation, encode_prompt
from avg_llava_jax.data.errors import BadSample
from avg_llava_jax.data.feedback import question_digest
from avg_llava_jax.data.packing import Sample, make_sample, tiles_of
from avg_llava_jax.data.sources import Source
from avg_llava_jax.data.tokenizer import Tokenizer
from avg_llava_jax.eval.policies import Choice, Record, by_key, choices
from avg_llava_jax.files import differing, lock, whole_lines
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.device import page_bytes
from avg_llava_jax.inference.engine import AHEAD, IMAGE_CACHE_BYTES, Engine
from avg_llava_jax.inference.guides import Guide
from avg_llava_jax.inference.job import Images, read_images
from avg_llava_jax.inference.model import Model, length_at, softmax, visual_tokens
from avg_llava_jax.inference.requests import Prepared, Request
from avg_llava_jax.inference.tickets import Ticket

READ_AHEAD = 32
"""Questions whose images are read before the engine has room for them."""
DIGITS = 7
"""Decimals of a certainty in a record."""
DERIVED = ("report.json", "tradeoff.json", "skipped.jsonl", "plots")
"""Files next to the answers, and made from them."""
MadeBy = dict[str, Any]
PROMPT = "prompt or images"


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt without its answer (`sample`, which has the id and the kind), and the reference answer.

    grade: the grade of an answer in [0, 1]; None = whether it equals `reference` after `normalise`.
    extra: entries that are copied into the record. guide: what its answers must be; None = any text.
    """

    sample: Sample
    text: str
    reference: str
    grade: Callable[[str], float] | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    guide: Guide | None = None

    def asked(self, request: Request, choice: tuple[int | None, ...]) -> Prepared:
        """The question as a request with these options. choice: as in `Prepared`."""
        return Prepared(dataclasses.replace(request, guide=self.guide), self.sample, choice)


def make_question(record: dict[str, Any], tokenizer: Tokenizer, template: str) -> Question:
    """A record of a source (`id, images, conversations, kind?`) as a question whose reference is its last answer.

    The prompt holds the earlier turns. Raises BadSample for a record that cannot be used.
    """
    turns, images = record.get("conversations"), record["images"]
    encode_conversation(turns, tokenizer, template, len(images))  # checks all of it, the answer included
    tokens = encode_prompt(turns[:-1], tokenizer, template, len(images))
    sample = make_sample(record["id"], tokens, images, record.get("kind"))
    return Question(sample, turns[-2]["value"].replace(PLACEHOLDER, "").strip(), turns[-1]["value"].strip())


def read_questions(
    source: Source, tokenizer: Tokenizer, config: ModelConfig
) -> tuple[list[Question], list[dict[str, str]]]:
    """All questions of a source, and the skipped records: `{"id", "reason", "detail"}`.

    The second record with an id becomes `id#2`, the third `id#3`, unless another record has that id.
    """
    questions, skipped, again, taken = [], [], collections.Counter[str](), set[str]()
    for index in range(len(source)):
        try:
            question = make_question(source[index], tokenizer, config.template)
        except BadSample as error:
            skipped.append({"id": str(index), "reason": error.reason, "detail": error.detail})
            continue
        sample = question.sample
        name = sample.id
        while name in taken:
            again[sample.id] += 1
            name = f"{sample.id}#{again[sample.id] + 1}"
        taken.add(name)
        if name != sample.id:
            question = dataclasses.replace(question, sample=dataclasses.replace(sample, id=name))
        questions.append(question)
    return questions, skipped


def check_fits(config: ModelConfig, sample: Sample) -> None:
    """Raises BadSample `too_long` if a prompt exceeds `max_length` even at the coarsest granularity."""
    need = length_at(config, sample, (config.granularities[0],) * len(sample.sizes))
    if need > config.language.max_length:
        limit = config.language.max_length
        raise BadSample("too_long", f"{need} tokens at the coarsest granularity, the model takes {limit}")


def normalise(text: str) -> str:
    """Text in lower case without punctuation, with single spaces: "The No. 7!" -> "the no 7"."""
    text = "".join(c for c in text.casefold() if not unicodedata.category(c).startswith("P"))
    return " ".join(text.split())


def answer_all(
    model: Model,
    questions: Sequence[Question],
    file: str | os.PathLike[str] | None = None,
    max_new_tokens: int = 16,
    batch_size: int = 32,
    progress: bool = True,
    skipped: list[dict[str, str]] | None = None,
) -> list[Record]:
    """Greedy answers of every question at every fixed granularity and at the router's choice.

        a question --> asked as the router chooses --its scores--> asked at every other granularity --> its record

    An image is encoded once for all requests and questions about it; a prefix is prefilled once while it is in a slot.

    file: JSON lines. Records are appended as they come. Answers that it holds for this model, prompt, images and
        `max_new_tokens` are reused, and graded against the present references; others are set aside, see `reuse`.
    batch_size: slots, the answers decoded at once.
    skipped: gets `{"id", "reason", "detail"}` of each question whose image is damaged or that fits at no granularity.

    Returns the records in the order of the questions: `id, kind, images (names), question, reference, answers {g: text,
    or None if the prompt does not fit}, right {g: bool or grade}, certainty {g: probability, see `Pass`},
    visual_tokens {g: int}, scores (images, G), probabilities (images, G), chosen (images,), answer (at the router's
    choice), adaptive {answer, right, certainty, visual_tokens}`, and the question's `extra`; with a `file`, `made_by`
    {name: digest} as well.

    Raises:
      BadSample: a question cannot be asked, and there is no list `skipped`.
      RuntimeError: the device failed.
    """
    with logged(model, questions, file, max_new_tokens, progress, skipped) as log:
        if log.todo:
            _answer(model, log, max_new_tokens, batch_size)
    return log.records()


def _answer(model: Model, log: Log, max_new_tokens: int, slots: int) -> None:
    config, request = model.config, Request("", max_new_tokens=max_new_tokens)
    samples = [question.sample for question in log.todo]
    tiles = max(tiles_of(sample, config) for sample in samples)
    longest = max(model.longest(Prepared(request, sample, (None,) * len(sample.sizes))) for sample in samples)
    engine = Engine(
        model,
        slots,
        longest,
        None,
        max(IMAGE_CACHE_BYTES, tiles * page_bytes(model)),
        queue=AHEAD * slots + len(config.granularities),
        prompts=[length_at(config, s, (g,) * len(s.sizes)) for s in samples for g in config.granularities],
    )
    running: list[_Asked] = []
    more = True
    with contextlib.closing(_read_ahead(config, log, _in_order(config, log.todo))) as reading:
        while more or running:
            # Enough to keep slots and micro-batches full, few enough that no image is evicted and encoded again.
            while more and sum(each.requests for each in running) < AHEAD * slots:
                question, images, made_by = next(reading, (None, [], {}))
                if question is None:
                    more = False
                elif isinstance(made_by, BadSample):
                    log.skip(question, made_by)
                else:
                    running.append(_Asked(engine, question, request, images, made_by))
            engine.step()
            for each in [each for each in running if each.answered()]:
                running.remove(each)
                log.add(each.record())


def _read_ahead(
    config: ModelConfig, log: Log, questions: Sequence[Question]
) -> Iterator[tuple[Question, Images, MadeBy | BadSample]]:
    """Each question with its images and its `made_by`, or with what is wrong; a thread reads `READ_AHEAD` ahead.

    A question about the same images as the one before shares their tiles.
    """
    before: Question | None = None
    images: Images = []

    def read(question: Question) -> tuple[Question, Images, MadeBy | BadSample]:
        nonlocal before, images
        try:
            check_fits(config, question.sample)
            made_by = log.made_by(question)
            if before is None or before.sample.images != question.sample.images:
                images, before = read_images(config, question.sample), question
            return question, images, made_by
        except BadSample as error:
            return question, [], error

    pool, ahead = concurrent.futures.ThreadPoolExecutor(1, "images"), deque[concurrent.futures.Future]()
    try:
        for question in questions:
            ahead.append(pool.submit(read, question))
            if len(ahead) > READ_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(config: ModelConfig, questions: Sequence[Question]) -> list[Question]:
    """Questions by length, so that prompts of one size are prefilled together, and then by picture."""
    finest = config.granularities[-1]
    cost = [sum(visual_tokens(config, q.sample, (finest,) * len(q.sample.sizes))) for q in questions]
    pictures = by_key(questions, lambda question: tuple(image.name for image in question.sample.images))
    first = {row: rows[0] for rows in pictures.values() for row in rows}
    return [questions[row] for row in sorted(range(len(questions)), key=lambda row: (cost[row], first[row]))]


class _Asked:
    """A question in the engine. requests: how many requests it submits in all."""

    def __init__(self, engine: Engine, question: Question, request: Request, images: Images, made_by: dict):
        self._engine, self._question, self._request, self._images = engine, question, request, images
        self._made_by = made_by
        # Without images all granularities give the same prompt.
        granularities = engine.config.granularities if images else engine.config.granularities[:1]
        self._fixed: list[Choice] = [(g,) * len(images) for g in granularities]
        self.requests = len(self._fixed)
        self._free = self._ask((None,) * len(images))
        self._scores: np.ndarray | None = None
        self._tickets: dict[Choice, Ticket | None] = {}  # None if the prompt does not fit

    def _ask(self, choice: tuple[int | None, ...]) -> Ticket:
        return self._engine.submit_prepared(self._question.asked(self._request, choice), self._images)

    def answered(self) -> bool:
        """Whether all answers are ready. Once the router has scored the images, submits the other granularities."""
        if self._scores is None and self._free.scores is not None:
            config = self._engine.config
            self._scores = np.array(self._free.scores, np.float32).reshape(-1, len(config.granularities))
            (chosen,) = choices(config, [self._scores])
            for choice in dict.fromkeys((chosen, *self._fixed)):
                fits = length_at(config, self._question.sample, choice) <= config.language.max_length
                self._tickets[choice] = None if not fits else self._free if choice == chosen else self._ask(choice)
        return self._free.ended and all(ticket is None or ticket.ended for ticket in self._tickets.values())

    def record(self) -> Record:
        """Raises RuntimeError if the device failed."""
        model = self._engine.model
        if self._scores is None:
            self._free.result(0)
        answers = {
            choice: None
            if ticket is None
            else (
                model.tokenizer.decode(list(ticket.result(0).token_ids)).strip(),
                round(ticket.result(0).certainty, DIGITS),
            )
            for choice, ticket in self._tickets.items()
        }
        return make_record(model.config, self._question, self._scores, answers) | self._made_by


def made_by(model: Model, question: Question, max_new_tokens: int) -> dict[str, Any]:
    """What identifies a question's answers, by name: `Model.made_by`, the limit, its guide, and prompt and images.

    Raises:
      BadSample: an image is missing.
    """
    guide = question.guide and reuse.digest(question.guide.grammar_text)
    return {**model.made_by, "max_new_tokens": max_new_tokens, "guide": guide, PROMPT: question_digest(question.sample)}


def settle(
    model: Model, questions: Sequence[Question], file: str | os.PathLike[str], max_new_tokens: int
) -> dict[str, MadeBy]:
    """Set aside the records of a file that `questions` cannot reuse, and bring the others up to date.

    A record is reused by the questions with the same `made_by`, whatever their ids, and graded again. Records of
    other questions stay, unless one of `questions` has their id.

    Returns the `made_by` of each question by id, {} if its image is missing; nothing if there are no records.
    """
    if not whole_lines(file):
        return {}
    now: dict[str, MadeBy] = {question.sample.id: {} for question in questions}
    waiting: dict[str, dict[str, Question]] = {}  # by digest and id, without a record so far
    for question in questions:
        with contextlib.suppress(BadSample):  # without its image a question cannot be asked
            found = now[question.sample.id] = made_by(model, question, max_new_tokens)
            waiting.setdefault(reuse.digest(found), {})[question.sample.id] = question

    def judge(record: Record) -> Record | str:
        before, name = record.get("made_by", {}), record["id"]
        if "certainty" not in record:
            return "an earlier version"
        alike = waiting.get(reuse.digest(before), {})
        if alike:
            return _graded_again(model.config, alike.pop(name if name in alike else next(iter(alike))), record)
        if name in now:
            return "other " + (differing(before, now[name]) or "questions")
        return record if not (other := differing(before, model.made_by)) else f"other {other}"

    reuse.sift(file, judge, DERIVED)
    return now


def _graded_again(config: ModelConfig, question: Question, record: Record) -> Record:
    """A stored record as `make_record` would make it for this question, whose prompt and images it answers."""
    answers = {
        (named(g),) * len(record["chosen"]): None if text is None else (text, record["certainty"][g])
        for g, text in record["answers"].items()
    }
    answers[tuple(record["chosen"])] = record["answer"], record["adaptive"]["certainty"]
    scores = np.array(record["scores"], np.float32).reshape(-1, len(config.granularities))
    return make_record(config, question, scores, answers) | {"made_by": record["made_by"]}


@contextlib.contextmanager
def logged(
    model: Model,
    questions: Sequence[Question],
    file: str | os.PathLike[str] | None,
    max_new_tokens: int,
    progress: bool,
    skipped: list[dict[str, str]] | None,
) -> Iterator[Log]:
    """A `Log` that starts with the records of `file` and appends to it; the arguments are those of `answer_all`.

    Raises RuntimeError if another process appends to the file.
    """
    if len({question.sample.id for question in questions}) < len(questions):
        raise ValueError("two questions have the same id; `read_questions` makes ids unique")
    known: dict[str, Record] = {}
    made: dict[str, MadeBy] = {}
    with contextlib.ExitStack() as opened:
        if file is not None:
            path = pathlib.Path(file)
            opened.callback(os.close, lock(path.with_name(f".{path.name}.lock"), path))
            made = settle(model, questions, file, max_new_tokens)
            known = read_records(file)
        todo = [question for question in questions if question.sample.id not in known]
        done = len(questions) - len(todo)
        bar = opened.enter_context(tqdm(total=len(questions), initial=done, unit="question", disable=not progress))
        sink = opened.enter_context(open(os.devnull if file is None else file, "a", encoding="utf-8"))

        def identify(question: Question) -> MadeBy:
            return made.get(question.sample.id) or made_by(model, question, max_new_tokens)

        yield Log(questions, todo, known, skipped, sink, bar, None if file is None else identify)


class Log:
    """Records of questions as they come: appended to a file (JSON lines), and counted on a progress bar with the score.

    todo: the questions without a record when the log was opened.
    identify: a question -> its `made_by`; None if records are not stored.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        todo: Sequence[Question],
        known: dict[str, Record],
        skipped: list[dict[str, str]] | None,
        sink: TextIO,
        bar: tqdm,
        identify: Callable[[Question], MadeBy] | None,
    ):
        self.todo, self._identify = todo, identify
        self._questions, self._known, self._skipped, self._sink, self._bar = questions, known, skipped, sink, bar
        self._right = sum(record["adaptive"]["right"] for record in known.values())

    def made_by(self, question: Question) -> dict[str, MadeBy]:
        """The `made_by` of the question's record. Raises BadSample if an image is missing."""
        return {} if self._identify is None else {"made_by": self._identify(question)}

    def add(self, record: Record) -> None:
        """Keep a record."""
        self._known[record["id"]] = record
        self._right += record["adaptive"]["right"]
        self._sink.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._sink.flush()
        self._bar.set_postfix_str(f"right {self._right / len(self._known):.3f}", refresh=False)
        self._bar.update()

    def skip(self, question: Question, error: BadSample) -> None:
        """Leave a question out and list it in `skipped`; without such a list, raise the error."""
        if self._skipped is None:
            raise error
        self._skipped.append({"id": question.sample.id, "reason": error.reason, "detail": error.detail})
        self._bar.update()

    def records(self) -> list[Record]:
        """All records, in the order of the questions."""
        return [self._known[question.sample.id] for question in self._questions if question.sample.id in self._known]


def read_records(file: str | os.PathLike[str]) -> dict[str, Record]:
    """Records by id. A last line that an interruption left incomplete is removed from the file."""
    try:
        records = [json.loads(line) for line in whole_lines(file)]
        return {record["id"]: _with_names(record) for record in records}
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file} is not a file of answers of this version ({error}); use another folder") from None


def _with_names(record: Record) -> Record:
    by_granularity = ("answers", "right", "certainty", "visual_tokens")
    return record | {key: {named(g): value for g, value in record[key].items()} for key in by_granularity}


def make_record(
    config: ModelConfig, question: Question, scores: np.ndarray, answers: Mapping[Choice, tuple[str, float] | None]
) -> Record:
    """The record of a question, see `answer_all`, from router scores (images, G) and its answers by choice.

    answers: text and certainty with all images at each granularity, and at the router's choice; None if the prompt
        does not fit.
    """
    sample, (choice,) = question.sample, choices(config, [scores])
    every = {g: (g,) * len(sample.sizes) for g in config.granularities}
    found = {choice: (None, 0.0) if answer is None else answer for choice, answer in answers.items()}
    texts = {g: found[each][0] for g, each in every.items()}
    text, certainty = found[choice]
    return {
        "id": sample.id,
        "kind": sample.kind,
        "images": [image.name for image in sample.images],
        "question": question.text,
        "reference": question.reference,
        "answers": texts,
        "right": {g: _right(text, question) for g, text in texts.items()},
        "certainty": {g: found[each][1] for g, each in every.items()},
        "visual_tokens": {g: sum(visual_tokens(config, sample, each)) for g, each in every.items()},
        "scores": scores.tolist(),
        "probabilities": [softmax(image) for image in scores],
        "chosen": list(choice),
        "answer": text,
        **question.extra,
        "adaptive": {
            "answer": text,
            "right": _right(text, question),
            "certainty": certainty,
            "visual_tokens": sum(visual_tokens(config, sample, choice)),
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
    """Answer questions whose images get different granularities, other than the router's choice in `answer_all`.

    questions, records, wanted: one entry of each per question; the records come from `answer_all` with a file. New
    answers are appended to `file` (JSON lines: `id, choice, answer, right, visual_tokens, made_by`; `answer` is None
    where the prompt does not fit). Entries of the file with the `made_by` of a record go into it, as
    `record["mixed"][choice]`; others are set aside.
    """
    path = pathlib.Path(file)
    by_id = {record["id"]: record for record in records}
    _settle_mixed(questions, by_id, path)
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
                question.sample.id: question.asked(request, choice)
                for question, choice in part
                if length_at(config, question.sample, choice) <= config.language.max_length
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
                    "certainty": 0.0 if answer is None else round(answer.certainty, DIGITS),
                    "visual_tokens": sum(visual_tokens(config, question.sample, choice)),
                    "made_by": by_id[question.sample.id].get("made_by"),
                }
                by_id[question.sample.id].setdefault("mixed", {})[choice] = entry
                sink.write(json.dumps(entry, ensure_ascii=False) + "\n")
            sink.flush()


def _settle_mixed(questions: Sequence[Question], by_id: Mapping[str, Record], path: pathlib.Path) -> None:
    """`settle` for the file of `answer_mixed`."""
    if not whole_lines(path):
        return
    asking = {question.sample.id: question for question in questions}
    ids: dict[str, list[str]] = {}
    for name, record in by_id.items():
        ids.setdefault(reuse.digest(record.get("made_by")), []).append(name)
    one = next(iter(by_id.values())).get("made_by", {})
    model = {name: value for name, value in one.items() if name not in ("guide", PROMPT)}

    def judge(entry: dict[str, Any]) -> dict[str, Any] | str:
        before, name = entry.get("made_by") or {}, entry["id"]
        if alike := ids.get(reuse.digest(before)):
            name = name if name in alike else alike[0]
            return entry | {"id": name, "right": _right(entry["answer"], asking[name])}
        now = by_id[name].get("made_by", {}) if name in by_id else model
        other = differing(before, now)
        return entry if not other and name not in by_id else f"other {other or 'questions'}"

    reuse.sift(path, judge)
