"""Our scorers against lmms-eval's own, where that package is installed: random answers, exact to 1e-9.

Its task modules are imported alone: the packages above them import torch and much else, which scoring does not need.
"""

import importlib
import importlib.util
import random
import sys
import types
from pathlib import Path

import pytest

from avg_llava_jax.eval.benchmarks import scoring, tasks
from avg_llava_jax.eval.benchmarks.rows import Row

SPEC = importlib.util.find_spec("lmms_eval")
if SPEC is None:
    pytest.skip("lmms-eval is not installed", allow_module_level=True)

PAIRS = 6000


def module(name):
    """A module of lmms-eval, its parent packages bare; skips where it needs what is not installed."""
    home = Path(SPEC.origin).parent
    parts = name.split(".")
    for depth in range(len(parts)):
        parent = ".".join(["lmms_eval", *parts[:depth]])
        if parent not in sys.modules:
            package = types.ModuleType(parent)
            package.__path__ = [str(home.joinpath(*parts[:depth]))]
            sys.modules[parent] = package
    try:
        return importlib.import_module(f"lmms_eval.{name}")
    except ModuleNotFoundError as error:
        pytest.skip(f"lmms_eval.{name} needs {error.name}")


WORDS = (
    *(
        "yes",
        "no",
        "Yes.",
        "No,",
        "the",
        "a",
        "An",
        "two",
        "none",
        "ten",
        "dont",
        "it's",
        "shouldnt've",
        "U.S.A.",
        "3.5",
    ),
    *(
        "12%",
        "12.4%",
        "%",
        "0",
        "-7",
        "1,234",
        "1e3",
        "nan",
        "inf",
        "$5",
        "½",
        "Ünï",
        "日本",
        "ß",
        "é",
        "left-hand",
        "a/b",
    ),
    *("(B)", "B", "A", "C.", "D)", "E:", "b", ":C", "(D).", "Answer:", "the answer is", "so", "is", "thus", "could be"),
    *("red", "green", "Blue", "banana", "[x]", '"quoted"', "don't", "?", "!", "''", "@home", "=", "\t", "\n", "result"),
)


def text(draw, most=6):
    """Random words, now and then glued, empty or all in capitals."""
    said = [draw.choice(WORDS) for _ in range(draw.choice((0, 1, 1, 1, 2, 3, most)))]
    joined = draw.choice((" ", " ", " ", "", ". ", "\n")).join(said)
    return draw.choice((str, str, str, str.lower, str.upper, str.title))(joined).strip()


def near(draw, gold):
    """The gold text, changed a little or not at all, or something else."""
    kind = draw.randrange(6)
    if kind == 0 or not gold:
        return text(draw)
    if kind == 1:
        at = draw.randrange(len(gold))
        return (gold[:at] + draw.choice(["", "x", " ", "."]) + gold[at + 1 :]).strip()
    return (gold, gold.upper(), f"The {gold}.", f"{gold}, {text(draw)}", f"so it is {gold}")[draw.randrange(5)].strip()


def ours(task, fields, answers):
    """(grades, metrics) by our scorers."""
    rows = [Row("", one, {}) for one in fields]
    grades = scoring.grade(task, rows, answers)
    return grades, scoring.metrics(task, scoring.tally(task, rows, answers, grades))


def cases(make):
    """PAIRS records and answers, seeded: make(draw) -> (fields, answer)."""
    draw = random.Random(7)
    made = [make(draw) for _ in range(PAIRS)]
    return [fields for fields, _ in made], [answer for _, answer in made]


def agree(grades, theirs):
    wrong = [n for n, (one, other) in enumerate(zip(grades, theirs, strict=True)) if abs(one - other) > 1e-9]
    assert not wrong, wrong[:5]
    assert 0.05 < sum(theirs) / len(theirs) < 0.95  # so that the cases can tell scorers apart


def test_exact_match():
    theirs_ = module("api.metrics")

    def make(draw):
        gold = text(draw, 2) or "yes"
        return {"answer": gold}, near(draw, gold)

    fields, answers = cases(make)
    theirs = [
        float(
            theirs_.exact_match_hf_evaluate([answer], [one["answer"]], ignore_case=True, ignore_punctuation=True)[
                "exact_match"
            ]
        )
        for one, answer in zip(fields, answers, strict=True)
    ]
    agree(ours(tasks.GQA, fields, answers)[0], theirs)


@pytest.mark.parametrize("task, name", [(tasks.TEXTVQA, "textvqa"), (tasks.VIZWIZ, "vizwiz_vqa")])
def test_soft_accuracy(task, name):
    theirs_ = module(f"tasks.{name}.utils")

    def make(draw):
        golds = [text(draw, 3) for _ in range(draw.randint(1, 3))]
        answers = [draw.choice(golds) for _ in range(draw.choice((1, 4, 10)))]
        return {"answers": answers, "question_id": 1}, near(draw, draw.choice(golds))

    fields, answers = cases(make)
    grades, values = ours(task, fields, answers)
    process = getattr(theirs_, f"{name}_process_results")
    copies = [{"answers": list(one["answers"]), "question_id": 1} for one in fields]
    theirs = [process(one, [answer])["exact_match"] for one, answer in zip(copies, answers, strict=True)]
    agree(grades, theirs)
    assert values["exact_match"] == pytest.approx(sum(theirs) / PAIRS, abs=1e-9)


def test_vqa_words_of_what_is_contracted():
    """Every contraction of the table, and every mark with and without a space beside it."""
    from avg_llava_jax.eval.benchmarks import words

    theirs = module("tasks._task_utils.vqa_eval_metric").EvalAIAnswerProcessor
    texts = [*theirs.CONTRACTIONS, *theirs.CONTRACTIONS.values(), *theirs.NUMBER_MAP]
    texts += [f"a{mark}b" for mark in theirs.PUNCTUATIONS] + [f"a{mark} b{mark}c" for mark in theirs.PUNCTUATIONS]
    texts += ["." * 40, "1.2.3.", "a.b . c"]
    assert [words.vqa_words(text) for text in texts] == [theirs()(text) for text in texts]


def test_anls():
    theirs_ = module("api.metrics")

    def make(draw):
        golds = [text(draw) for _ in range(draw.randint(1, 3))]
        return {"answers": golds}, near(draw, draw.choice(golds))

    fields, answers = cases(make)
    theirs = [
        theirs_.anls(references=one["answers"], predictions=[answer])["anls"]
        for one, answer in zip(fields, answers, strict=True)
    ]
    agree(ours(tasks.DOCVQA, fields, answers)[0], theirs)


def test_relaxed_accuracy():
    process = module("tasks.chartqa.utils").chartqa_process_results

    def make(draw):
        gold = draw.choice(
            (str(draw.randint(-9, 200)), f"{draw.random() * 50:.2f}", f"{draw.randint(0, 99)}%", text(draw))
        )
        answer = near(draw, gold)
        if draw.random() < 0.5 and gold.lstrip("-").replace(".", "").isdigit():
            answer = f"{float(gold) * draw.choice((0.94, 0.95, 0.96, 1.05, 1.051)):.4f}"
        return {"answer": gold or "0", "type": draw.choice(("human_test", "augmented_test"))}, answer

    fields, answers = cases(make)
    grades, values = ours(tasks.CHARTQA, fields, answers)
    theirs = [process(one, [answer]) for one, answer in zip(fields, answers, strict=True)]
    agree(grades, [one["relaxed_overall"] for one in theirs])
    for name, value in values.items():
        found = [one[name] for one in theirs if name in one]
        assert value == pytest.approx(sum(found) / len(found), abs=1e-9)


def lettered(draw):
    """Options, the place of the right one, and an answer that may name it."""
    options = [text(draw, 2) or f"option {n}" for n in range(draw.randint(2, 5))]
    at = draw.randrange(len(options))
    letter = "ABCDE"[draw.choice((at, at, draw.randrange(len(options))))]
    said = draw.choice(
        (letter, letter.lower(), f"{letter}.", f"({letter})", f"{letter}) x", f"{letter}. {options[at]}", f": {letter}",
         options[at], f"The answer is {letter}", f"A dog and {letter}", f"It is {options[at]} I think, so ({letter})",
         text(draw))
    )  # fmt: skip
    return options, at, said.strip()


def test_scienceqa():
    process = module("tasks.scienceqa.utils").sqa_process_results

    def make(draw):
        options, at, said = lettered(draw)
        return {"choices": options, "answer": at}, said

    fields, answers = cases(make)
    agree(
        ours(tasks.SCIENCEQA, fields, answers)[0],
        [process(one, [answer])["exact_match"] for one, answer in zip(fields, answers, strict=True)],
    )


def test_ai2d():
    filter_ = module("tasks.ai2d.utils").MultiChoiceRegexFilter()
    metric = module("api.metrics").exact_match_hf_evaluate

    def make(draw):
        options, at, said = lettered(draw)
        return {"options": options, "answer": str(at)}, said

    fields, answers = cases(make)
    said = filter_.apply([[answer] for answer in answers], fields)
    theirs = [
        float(
            metric([one.strip()], ["ABCDE"[int(row["answer"])]], ignore_case=True, ignore_punctuation=True)[
                "exact_match"
            ]
        )
        for one, row in zip(said, fields, strict=True)
    ]
    agree(ours(tasks.AI2D, fields, answers)[0], theirs)


def test_pope():
    theirs_ = module("tasks.pope.utils")

    def make(draw):
        said = draw.choice(("yes", "Yes", "no", "NO ", "No.", "", "maybe", text(draw))).strip()
        return {"answer": draw.choice(("yes", "no", "Yes")), "question_id": 1}, said

    fields, answers = cases(make)
    grades, values = ours(tasks.POPE, fields, answers)
    theirs = [theirs_.pope_process_results(one, [answer]) for one, answer in zip(fields, answers, strict=True)]
    agree(grades, [one["pope_accuracy"]["score"] for one in theirs])
    for name, value in values.items():
        aggregate = getattr(theirs_, f"pope_aggregate_{name.removeprefix('pope_')}")
        assert value == pytest.approx(aggregate([one[name] for one in theirs]), abs=1e-9), name


def test_mme():
    theirs_ = module("tasks.mme.utils")
    draw = random.Random(7)
    categories = [name for names in theirs_.eval_type_dict.values() for name in names] + ["unheard_of"]
    fields, answers = [], []
    for number in range(PAIRS // 2):
        category = draw.choice(categories)
        for gold in ("Yes", "No."):
            fields.append(
                {"answer": gold.strip("."), "category": category, "question_id": number // 2 * 2 + number % 2}
            )
            answers.append(draw.choice(("Yes", "no", "y", "N", "x", "Not at all", "It is yes", text(draw))))
    grades, values = ours(tasks.MME, fields, answers)
    found, theirs = {}, []
    for one, answer in zip(fields, answers, strict=True):
        for name, entry in theirs_.mme_process_results(one, [answer]).items():
            found.setdefault(name, []).append(entry)
            theirs.append(entry["score"])
    agree(grades, theirs)
    assert values == pytest.approx(
        {name: theirs_.mme_aggregate_results(all_) for name, all_ in found.items()}, abs=1e-9
    )


class Table(list):
    """Records as that evaluator reads them of a data frame, which is slow to make."""

    iloc = property(lambda self: self)


def test_mmbench():
    pytest.importorskip("pandas")
    evaluator = module("tasks.mmbench.mmbench_evals").MMBench_Evaluator()
    draw = random.Random(7)
    fields, answers = [], []
    while len(fields) < PAIRS:
        base = len(fields)
        for turn in range(draw.choice((1, 2, 4))):
            options, at, said = lettered(draw)
            at = min(at, 3)
            letters = {letter: "nan" for letter in "ABCDE"} | dict(zip("ABCD", options, strict=False))
            fields.append({"index": base + turn * 1_000_000, "answer": "ABCD"[at], **letters})
            answers.append(said if draw.random() < 0.3 else "ABCD"[at])
    grades, values = ours(tasks.MMBENCH, fields, answers)
    records = [
        one | {"prediction": answer, "category": "c", "L2-category": "d", "question": "", "hint": "", "split": "dev"}
        for one, answer in zip(fields, answers, strict=True)
    ]
    overall, _, _ = evaluator.eval_result(records, eval_method="static")
    assert values["gpt_eval_score"] == pytest.approx(100 * overall, abs=1e-9)
    # Each record as a question of its own, so that every single grade is compared.
    theirs = [
        evaluator.eval_sub_data(Table([record]), {record["index"]: record["answer"]}, static_only=True)
        for record in records
    ]
    agree(grades, theirs)


def test_mmmu():
    theirs_ = module("tasks.mmmu.utils")

    def make(draw):
        if draw.random() < 0.4:
            gold = draw.choice(
                (text(draw, 2) or "x", f"{draw.randint(0, 3000)}", f"{draw.random() * 9:.3f}", "a", "1,200")
            )
            return {"id": "validation_Math_1", "question_type": "open", "options": "[]", "answer": gold}, near(
                draw, gold
            )
        options, at, said = lettered(draw)
        fields = {"question_type": "multiple-choice", "options": repr(options), "answer": "ABCDE"[at]}
        return fields | {"id": f"validation_{draw.choice(('Art', 'Basic_Medical_Science'))}_1"}, said

    fields, answers = cases(make)
    grades, values = ours(tasks.MMMU, fields, answers)
    random.seed(0)
    processed = [
        theirs_.mmmu_process_results(one, [answer])["mmmu_acc"] for one, answer in zip(fields, answers, strict=True)
    ]
    theirs = [theirs_.evaluate_mmmu([one])[1]["acc"] for one in processed]
    agree(grades, theirs)
    assert values["mmmu_acc"] == pytest.approx(theirs_.mmmu_aggregate_results(processed), abs=1e-9)


def test_the_plugin(tiny, tokenizer, monkeypatch):
    """Results in the order of the requests, each as the model answers it alone; none where a prompt is too long."""
    from PIL import Image

    from avg_llava_jax.inference.api import AvgLlava
    from tests.random_model import random_model

    for name in ("api.model", "models.registry_v2", "models.model_utils.gen_metrics"):
        module(name)
    plugin = importlib.import_module("avg_llava_jax.eval.lmms_eval_plugin")
    model = random_model(tiny, tokenizer)
    monkeypatch.setattr(AvgLlava, "load", lambda *of, **options: model)
    wrapped = plugin.AvgLlavaForLmmsEval(checkpoint="W", granularity="auto", batch_size="2")
    docs = [{"image": Image.new("RGB", (30, 30), colour)} for colour in ("red", "green", "blue")] + [{"image": None}]
    wrapped.task_dict["pope"] = {"test": docs}
    texts = ["Is it red?", "red " * 300, "What?", "Hello?"]
    options = {"max_new_tokens": 3, "temperature": 0, "do_sample": False, "until": ["\n\n"]}

    def images(doc):
        return [doc["image"]] if doc["image"] else []

    instances = [
        types.SimpleNamespace(args=(text, dict(options), images, n, "pope", "test")) for n, text in enumerate(texts)
    ]
    results = wrapped.generate_until(instances)
    assert results[1].text == "" and results[1].token_counts is None
    for n in (0, 2, 3):
        answer = model.answer(images(docs[n]), texts[n], max_new_tokens=3)
        counts = results[n].token_counts.to_dict()
        assert results[n].text == answer.text and counts["output_tokens"] == len(answer.token_ids)
        assert (counts["visual_tokens"], counts["granularity"]) == (answer.visual_tokens, answer.granularity)
        assert counts["seconds"].keys() == answer.timings.keys() and counts["seconds"]["total"] > 0
    summary = module("models.model_utils.gen_metrics").summarize_logged_metrics()
    assert summary["total_gen_tokens"] == sum(r.token_counts.output_tokens for r in results if r.token_counts)
    assert summary["avg_latency"] == pytest.approx(summary["total_elapsed_time"] / 4) and summary["avg_visual_tokens"]
    assert summary["avg_samples_per_second"] == pytest.approx(4 / summary["total_elapsed_time"])
    with pytest.raises(NotImplementedError):
        wrapped.loglikelihood([])
    with pytest.raises(ValueError, match="1 of 1 requests are not answered, the last one: the prompt takes"):
        wrapped.generate_until(instances[1:2])
    assert plugin.AvgLlavaForLmmsEval(granularity="4").granularity == 4
    bounded = plugin.AvgLlavaForLmmsEval(max_pixels="899")
    bounded.task_dict["pope"] = {"test": docs}
    assert [bool(result.token_counts) for result in bounded.generate_until([*instances[:1], instances[3]])] == [
        False,
        True,
    ]
    pytest.importorskip("llguidance")
    guided = plugin.AvgLlavaForLmmsEval(guided="True")
    guided.task_dict["pope"] = {"test": docs}
    asked = "Which?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly."
    (one,) = guided.generate_until([types.SimpleNamespace(args=(asked, dict(options), images, 0, "pope", "test"))])
    assert one.text in ("A", "B") and one.token_counts.output_tokens <= 2
    for options, message in (
        ({"granularity": "36"}, "granularity='36' is not one of this model's: auto, 4, 8, 16"),
        ({"granularity": 7}, "granularity=7 is not one of this model's"),
        ({"granularity": "all"}, "granularity='all' is not one of this model's"),
        ({"batch_size": "auto"}, "batch_size='auto' must be a whole number of at least 1"),
        ({"max_pixels": "many"}, "max_pixels='many' must be a whole number of at least 1"),
        ({"guided": "yes"}, "guided='yes' must be True or False"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            plugin.AvgLlavaForLmmsEval(**options)
