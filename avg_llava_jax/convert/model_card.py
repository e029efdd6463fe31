"""README.md of an exported folder: description of the model, usage, training settings and results."""

import json
import os
import pathlib
from typing import Any, Literal

from avg_llava_jax import parameters
from avg_llava_jax.checkpoint import Loaded
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.convert import llava_next
from avg_llava_jax.convert.tensors import read_json
from avg_llava_jax.files import portable

CARD = "README.md"
REPORT = "report.json"

TRANSFORMERS = """\
```python
from transformers import {model_class}, AutoProcessor

processor = AutoProcessor.from_pretrained("{name}")
model = {model_class}.from_pretrained("{name}"{trust})
turns = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is this?"}}]}}]
text = processor.apply_chat_template(turns, add_generation_prompt=True)
inputs = processor(images=image.convert("RGB"), text=text, return_tensors="pt")
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=64), skip_special_tokens=True)[0])
```"""

BOTH = """\
`trust_remote_code` runs this folder's `modeling_avg_llava.py`, which adds the router;
`generate(..., granularity={middle!r})` overrides its choice. Without `trust_remote_code` the folder is a plain {plain}
that always uses {finest} tokens per tile: load it with
`{plain_class}.from_pretrained("{name}")`."""

PIXELS = """\
`image.convert("RGB")` is required: the model was trained on the colour stored under transparent pixels, like released
LLaVA models, but the image processors of newer transformers (5.24) blend transparency onto white. Pillow 13 resizes
some tall images in another order than earlier releases, which changes pixels of noise by about 20 levels of 255: with
`pillow<13` the processor produces the pixels of training."""

RELEASED = """\
The layout is that of the released code, whose `load_pretrained_model` reads the folder. So does
avg_llava_jax: `python -m launch.answer --checkpoint={name} --image=photo.png
--prompt="What is this?"`."""


def card(
    loaded: Loaded,
    output: str | os.PathLike[str],
    layout: Literal["released", "transformers"],
    router: bool,
    report: dict[str, Any] | None,
) -> str:
    """Build the model card of folder `output`: Markdown with the hub's front matter.

    router: whether the folder holds a router. report: result of `policies.report`, None = not evaluated.
    """
    name = pathlib.Path(output).name
    return "\n\n".join(
        (
            "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags: [llava-next"
            + (", avg-llava]" if router else "]")
            + f"\n---\n\n# {name}",
            _what(loaded, router),
            "## Use\n\n" + _use(loaded, name, layout, router),
            "## Training\n\n" + _training(loaded),
            "## Measured\n\n" + _measured(report),
            "## License\n\nThe code in this folder, where there is any, is under Apache 2.0. The weights are under the"
            " license of what they were trained from and on; whoever publishes them names it here.\n",
        )
    )


def read_report(source: pathlib.Path, given: str | os.PathLike[str] | None) -> dict[str, Any] | None:
    """Read the evaluation of a checkpoint: the given file, else report.json in its folder, else None.

    Raises:
      ValueError: the file was not written by `avg-llava evaluate`.
    """
    path = pathlib.Path(given or source / REPORT)
    if given is None and not path.is_file():
        return None
    report = read_json(path)
    if not {"accuracy", "visual_tokens", "n"} <= report.keys():
        raise ValueError(f"{path} is not a report of avg-llava evaluate: it lacks accuracy, visual_tokens or n")
    return report


def _what(loaded: Loaded, router: bool) -> str:
    config, leaves = loaded.config, parameters.flat(loaded.params)
    total = sum(leaf.size for path, leaf in leaves.items() if router or not path.startswith("router/"))
    ladder = ", ".join(map(str, config.granularities))
    if router:
        begin = (
            f"An AVG-LLaVA ([Lan et al., Findings of ACL 2025](https://arxiv.org/abs/2410.02745)), a {_plain(config)}"
            f" whose router reads image and question and chooses among {ladder} tokens per tile."
        )
    else:
        begin = f"A {_plain(config)} without router, with {config.tokens[-1]} tokens per tile."
    rows = {
        "parameters": f"{total / 1e6:,.1f} M",
        "tile": f"{config.vision.image_size} x {config.vision.image_size} pixels",
        "largest mosaics": ", ".join(f"{width} x {height}" for width, height in config.pinpoints) or "none",
        "prompt template": config.template,
        "longest sequence": f"{config.language.max_length} tokens",
        "un-padding": config.unpad,
    }
    if router:
        rows["router"] = f"attention over {config.router.attention}, {config.router.text_tokens} text tokens"
    return begin + "\n\n" + _table(["", ""], [[key, value] for key, value in rows.items()])


def _plain(config: ModelConfig) -> str:
    """What the model is without its router."""
    return "LLaVA-OneVision" if config.several == "square" else "LLaVA-NeXT"


def _use(loaded: Loaded, name: str, layout: str, router: bool) -> str:
    if layout == "released":
        return RELEASED.format(name=name)
    plain_class = llava_next.STYLES[llava_next.style_of(loaded.config)].name + "ForConditionalGeneration"
    model_class = "AutoModelForImageTextToText" if router else plain_class
    use = TRANSFORMERS.format(model_class=model_class, name=name, trust=", trust_remote_code=True" if router else "")
    ladder = loaded.config.granularities
    both = BOTH.format(
        middle=ladder[len(ladder) // 2],
        finest=loaded.config.tokens[-1],
        name=name,
        plain=_plain(loaded.config),
        plain_class=plain_class,
    )
    return "\n\n".join((use, PIXELS, both) if router else (use, PIXELS))


def _training(loaded: Loaded) -> str:
    training, trained = portable(loaded.meta["training"]), loaded.meta["granularities_trained"]
    if training is None:
        return "Not trained by avg_llava_jax since it was imported; its settings are those of its source."
    said = f"Phase `{training['phase']}`, step {loaded.meta['step']} of {training['steps']}"
    said += f", on `{training['data']['path']}`" if training["data"]["path"] else ""
    said += f", from `{training['init_from']}`" if training["init_from"] else ", from fresh parameters"
    said += f"; tuned at {', '.join(map(str, trained))} tokens a tile." if trained else "."
    if training["phase"] != "rglf":
        said += " This phase does not train the router, which keeps its earlier weights."
    settings = json.dumps(training, indent=1, ensure_ascii=False)
    return f"{said}\n\n<details><summary>All settings</summary>\n\n```json\n{settings}\n```\n\n</details>"


def _measured(report: dict[str, Any] | None) -> str:
    if report is None:
        return "It was not measured: the checkpoint has no report of `avg-llava evaluate`."
    accuracy, tokens = report["accuracy"], report["visual_tokens"]
    kinds = list(accuracy["adaptive"])
    rows = [(f"always {g}", accuracy["fixed"][g], tokens["fixed"][g]) for g in accuracy["fixed"]]
    rows += [(title, accuracy[key], tokens[key]) for title, key in (("the router", "adaptive"), ("oracle", "oracle"))]
    lines = [[title, *(f"{right[kind]:.3f}" for kind in kinds), f"{cost:.1f}"] for title, right, cost in rows]
    return f"Share of right answers to {report['n']} questions, by tokens a tile.\n\n" + _table(
        ["", *kinds, "visual tokens"], lines
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
