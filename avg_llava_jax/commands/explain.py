"""Show why the router chose a granularity, and whether the answer would escalate.

avg-llava explain --image=photo.png --prompt="Who wears 7?" --figure=why.png
avg-llava explain --image=photo.png --prompt="Who wears 7?" --figure=why.png --cost_weight=2 --escalate=0.9
"""

import pathlib

from absl import flags

from avg_llava_jax.commands import cli, pictures

IMAGE = flags.DEFINE_multi_string("image", None, "An image file; repeat the flag for several images.")
PROMPT = flags.DEFINE_string("prompt", None, "The question; <image> in it places an image.")
RAW = flags.DEFINE_bool("raw", False, "Use the prompt verbatim, <image> included, without a conversation template.")
COST_WEIGHT = flags.DEFINE_float("cost_weight", 0, "The router's price of visual tokens.", lower_bound=0)
ESCALATE = flags.DEFINE_float("escalate", 0, "Answer, and again if less certain than this; 0 = do not answer.", 0, 1)
OUTPUT = flags.DEFINE_string("output", None, "File for the arrays, an .npz; see explain.Explanation.")
FIGURE = flags.DEFINE_string("figure", None, "File for the figure: .png, .pdf or .svg.")
flags.adopt_module_key_flags(pictures)


def main() -> None:
    for flag in (OUTPUT, FIGURE):
        if flag.value and not pathlib.Path(flag.value).resolve().parent.is_dir():
            raise FileNotFoundError(f"--{flag.name}={flag.value}: its folder does not exist")
    if FIGURE.value and pathlib.Path(FIGURE.value).suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--figure={FIGURE.value}: must end in .png, .pdf or .svg")
    from avg_llava_jax.eval import explain
    from avg_llava_jax.inference.requests import Request

    options = {"raw": RAW.value, "cost_weight": COST_WEIGHT.value, "escalate": ESCALATE.value}
    found = explain.explain(cli.load_model(), Request(PROMPT.value, pictures.refs(IMAGE.value), **options))
    for i, (path, scores, shares) in enumerate(zip(IMAGE.value, found.router_logits, found.probabilities, strict=True)):
        print(f"{path}: {found.router_choice_granularity[i]} tokens a tile")
        for g, score, share in zip(found.config.granularities, scores, shares, strict=True):
            print(f"  {g:6d}  score {score:7.3f}  probability {share:.3f}  {'#' * round(40 * share)}")
        print(f"  instruction read: {' | '.join(word.strip() for word in found.words[i] if word.strip())}")
    for name, length in zip([*found.config.granularities, "router"], found.seq_len, strict=True):
        left_out = "" if name in found.logits else "  (over the model's limit)"
        print(f"packed length at {name}: {length}{left_out}")
    for name, answer in zip(explain.look_names(len(found.answers)), found.answers, strict=True):
        last = answer.passes[-1]
        print(f"{name}: {answer.text!r} from {last.visual_tokens} visual tokens, certainty {answer.certainty:.4f}")
    if OUTPUT.value:
        found.save(OUTPUT.value)
    if FIGURE.value:
        explain.draw(found, FIGURE.value)


def command() -> None:
    cli.run(main, required=["image", "prompt"])
