"""The steps of `avg-llava quickstart`, one function each: train a router on the shipped model, test it, plot it.

The shipped model was trained at every granularity, its router not at all. The quickstart trains the router from
nothing but how well the frozen model answers at each granularity, and tests it on held-out scenes.
"""

import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from avg_llava_jax import checkpoint, reuse
from avg_llava_jax.configs import jersey
from avg_llava_jax.data.jersey import Jersey
from avg_llava_jax.eval import evaluation, plots, policies, routing, timing
from avg_llava_jax.files import same_run, write_whole
from avg_llava_jax.inference.api import SHIPPED, AvgLlava
from avg_llava_jax.parallel import sharding
from avg_llava_jax.training import feedback, loop, setup
from avg_llava_jax.training.config import read

TEST = Jersey(split="test", paired=True)
TRAINING = ("training", "eval/quickstart.py")
"""Sources that the routers depend on beyond those of `reuse.ANSWERING`."""
QUESTIONS = 1008  # a third of them coarse, fine and near each
ANSWER_TOKENS = 4  # the longest answer of jersey has one and the end of the text
TIMED = 6  # questions, two of each kind


def router_config(
    checkpoint: str = str(SHIPPED), steps: int | None = None, pictures: int | None = None, config: Any = None
) -> Any:
    """`configs/jersey.py:router`, or `config`, starting from a checkpoint; fewer steps or pictures shorten the run."""
    config = config or jersey.get_config("router")
    config.init_from = str(checkpoint)
    config.steps = steps or config.steps
    if pictures:
        config.data.path += f"&size={pictures}"
    return config


def collect_feedback(model: AvgLlava, config: Any, workdir: pathlib.Path) -> pathlib.Path:
    """Store the frozen model's feedback on the router's split, with its features; returns the folder."""
    path = workdir / "feedback"
    if not (workdir / "feedback.seconds").exists():
        begin = time.perf_counter()
        mesh = sharding.make_mesh(config.mesh)
        dtype = setup.DTYPES[config.compute_dtype]
        params = checkpoint.load(config.init_from, None, mesh, dtype).params
        batches = setup.plan_batches(read(config), model.config, model.tokenizer)
        feedback.measure(model.config, params, batches, config.steps, path, mesh, keep_features=True)
        _note_seconds(workdir, "feedback", begin)
    return path


def train_router(config: Any, stored: pathlib.Path, workdir: pathlib.Path) -> AvgLlava:
    """RGLF on stored feedback; returns the model with its new router."""
    loop.train(_on_stored(config, stored), workdir)
    return AvgLlava.load(workdir)


def train_routers(configs: Mapping[str, Any], stored: pathlib.Path, workdir: pathlib.Path) -> dict[str, AvgLlava]:
    """`train_router` by name, all at the same time, each in the folder of its name."""
    folders = {name: workdir / name for name in configs}
    begin = time.perf_counter()
    started = any(checkpoint.steps(folder) for folder in folders.values())
    loop.train_together({folders[name]: _on_stored(config, stored) for name, config in configs.items()})
    if not started:
        _note_seconds(workdir, "routers", begin)
    return {name: AvgLlava.load(folder) for name, folder in folders.items()}


def _on_stored(config: Any, stored: pathlib.Path) -> Any:
    config = config.copy_and_resolve_references()
    config.rglf.feedback = str(stored)
    return config


def with_paper_objective(config: Any) -> Any:
    """The config with the paper's objective, which has no ties and no expected NLL."""
    config = config.copy_and_resolve_references()
    config.rglf.tie_nats = config.rglf.nll_weight = 0.0
    return config


def _note_seconds(workdir: pathlib.Path, what: str, begin: float) -> None:
    """Store the seconds of a part, for a run that resumes."""
    write_whole(workdir / f"{what}.seconds", f"{time.perf_counter() - begin:.1f}\n")


def _seconds(workdir: pathlib.Path, what: str) -> float | None:
    """The seconds of a part, None if it was interrupted."""
    path = workdir / f"{what}.seconds"
    return float(path.read_text()) if path.exists() else None


def test_questions(model: AvgLlava, count: int = QUESTIONS) -> list[evaluation.Question]:
    """Test questions: coarse, fine and near alternate; of each three, two are about the same picture."""
    return [evaluation.make_question(TEST[at], model.tokenizer, model.config.template) for at in range(count)]


def compare(
    adaptive: AvgLlava, paper: AvgLlava, questions: list[evaluation.Question], workdir: pathlib.Path
) -> dict[str, Any]:
    """The content of report.json.

    The two models differ only in the router, so `paper` only routes. In the two controls the router of `adaptive` gets
    another question's instruction, or another question's picture.
    """
    config = adaptive.config
    records = evaluation.answer_all(adaptive, questions, workdir / "answers.jsonl", ANSWER_TOKENS)
    seconds = timing.seconds_per_answer(adaptive, questions, TIMED, ANSWER_TOKENS)
    report = policies.report(config, records, seconds)
    samples = [question.sample for question in questions]
    pyramids = routing.encode_once(adaptive, samples)
    routed = {
        "adaptive_paper": (paper, samples),
        "shuffled_instruction": (adaptive, routing.shuffled(questions, "instruction")),
        "shuffled_image": (adaptive, routing.shuffled(questions, "image")),
    }
    others = {
        name: policies.choices(config, routing.route_all(model, asked, pyramids=pyramids))
        for name, (model, asked) in routed.items()
    }
    outcomes = {name: policies.outcome(config, records, picked) for name, picked in others.items()}
    paper_outcome = outcomes.pop("adaptive_paper")
    for key in ("accuracy", "visual_tokens", "visual_tokens_by_kind"):
        report[key]["adaptive_paper"] = paper_outcome[key]
    report["chosen_paper"] = paper_outcome["chosen"]
    return report | outcomes


def table(report: dict[str, Any]) -> str:
    """Accuracy by kind, and visual tokens, a line per policy."""
    kinds = list(report["accuracy"]["adaptive"])
    fixed = report["accuracy"]["fixed"]
    rows = [(f"always {g}", fixed[g], report["visual_tokens"]["fixed"][g]) for g in fixed]
    named = {"random": "random", "adaptive": "the router", "adaptive_paper": "the router, no ties"}
    named |= {"escalation": "escalation", "combined": "router and escalation", "oracle": "oracle"}
    rows += [(title, report["accuracy"][name], report["visual_tokens"][name]) for name, title in named.items()]
    for name in ("shuffled_instruction", "shuffled_image"):
        rows.append((name.replace("_", " "), report[name]["accuracy"], report[name]["visual_tokens"]))
    lines = [f"{'tokens a tile':<22}" + "".join(f"{kind:>9}" for kind in kinds) + f"{'visual tokens':>16}"]
    for title, right, cost in rows:
        lines.append(f"{title:<22}" + "".join(f"{right[kind]:>9.3f}" for kind in kinds) + f"{cost:>16.1f}")
    by_kind = report["visual_tokens_by_kind"]["adaptive"]
    lines.append("the router spends " + ", ".join(f"{by_kind[kind]:.0f} on {kind}" for kind in kinds))
    return "\n".join(lines)


def one_scene(model: AvgLlava, path: pathlib.Path) -> pathlib.Path:
    """Ask three questions about one team photo, and draw the grid that the router chose for each."""
    for at in range(0, 600, 6):
        scene = TEST[at]["images"][0]
        if scene.size[0] / scene.size[1] == 2 and len(scene.scene.players) >= 8:
            break
    players = scene.scene.players
    asked = [
        "What is the team's colour?",
        f"What number is the player in {players[1].shirt}?",
        f"Which shirt has the number {players[-2].number}?",
    ]
    image = scene.load()
    answers = [model.answer(image, question, max_new_tokens=ANSWER_TOKENS) for question in asked]
    for question, answer in zip(asked, answers, strict=True):
        print(f"  {question:<44} {answer.text:<8} with {answer.visual_tokens} visual tokens")
    return plots.one_scene(model.config, image, asked, answers, path)


def run(workdir: pathlib.Path, config: Any, questions: int = QUESTIONS) -> dict[str, Any]:
    """Run all steps, with a router trained by `config`; returns the report. An interrupted run resumes.

    Raises:
      ValueError: the workdir holds results of other settings, another model or other code.
    """
    model = AvgLlava.load(config.init_from)
    settings = {"config": json.loads(config.to_json_best_effort()), "questions": questions}
    same_run(workdir, "quickstart.json", settings, model.made_by | {"training code": reuse.code(TRAINING)})
    print(f"1. asking the frozen model at every granularity {model.config.granularities}", flush=True)
    stored = collect_feedback(model, config, workdir)
    print(f"2. training the router (ties within {config.rglf.tie_nats} nats rank cheapest first)", flush=True)
    print("   and beside it, one as in the paper (no ties)", flush=True)
    configs = {"adaptive": config, "adaptive_paper": with_paper_objective(config)}
    adaptive, paper = train_routers(configs, stored, workdir).values()

    print("3. answering test questions", flush=True)
    report = compare(adaptive, paper, test_questions(adaptive, questions), workdir)
    report["seconds"]["feedback"] = _seconds(workdir, "feedback")
    report["seconds"]["router_training"] = _seconds(workdir, "routers")
    write_whole(workdir / "report.json", json.dumps(report, indent=1) + "\n")

    print(table(report))
    print("4. one scene, three questions", flush=True)
    pictures = workdir / plots.PLOTS
    drawn = [
        plots.accuracy_against_tokens(report, pictures / "accuracy_against_tokens.png"),
        plots.choices(report, pictures / "choices.png"),
        plots.voter(adaptive.config, np.asarray(adaptive.params["router"]["voter"]), pictures / "voter.png"),
        one_scene(adaptive, pictures / "one_scene.png"),
    ]
    for path in drawn:
        print(f"  {path}")
    return report
