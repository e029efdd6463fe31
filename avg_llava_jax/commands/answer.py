"""Ask a question about images, or without any.

    avg-llava answer --image=photo.png --prompt="Who wears 7?"

--image may be given several times, or not at all. The other flags are fields of `avg_llava_jax.Request`.
"""

from absl import flags

from avg_llava_jax.commands import cli, pictures
from avg_llava_jax.config import named

IMAGE = flags.DEFINE_multi_string("image", [], "An image file; repeat the flag for several images.")
PROMPT = flags.DEFINE_string("prompt", None, "The question; <image> in it places an image.")
GRANULARITY = flags.DEFINE_string(
    "granularity", "auto", "auto, tokens per tile, or one of these for each image: auto,36."
)
COST_WEIGHT = flags.DEFINE_float(
    "cost_weight", 0.0, "The price of visual tokens for the router; 0 is the paper's choice.", 0.0
)
MAX_VISUAL_TOKENS = flags.DEFINE_integer("max_visual_tokens", None, "Upper bound, all images together.", 1)
ESCALATE = flags.DEFINE_string(
    "escalate", "0", "A probability: an answer less certain is given again at a finer granularity. Or: calibrated."
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Length of the longest answer, in tokens.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.", lower_bound=0.0)
TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the smallest set of tokens with this probability.", 0.0, 1.0)
TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from the k best tokens; 0 is off.", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.", lower_bound=0)
STOP = flags.DEFINE_multi_string("stop", [], "A text that ends the answer; may be given several times.")
RAW = flags.DEFINE_bool("raw", False, "Use the prompt verbatim, without a conversation template.")
STREAM = flags.DEFINE_bool("stream", False, "Print the answer while it is generated.")
flags.adopt_module_key_flags(pictures)


def granularity_of(text: str) -> str | int | list[str | int]:
    """The flag's value: "auto" -> "auto", "36" -> 36, "auto,36" -> ["auto", 36]."""
    each = [named(part.strip()) for part in text.split(",")]
    return each[0] if len(each) == 1 else each


def escalate_of(text: str) -> str | float:
    """The flag's value: "calibrated", or "0.9" -> 0.9. Raises ValueError for anything else."""
    try:
        return text if text == "calibrated" else float(text)
    except ValueError:
        raise ValueError(f"--escalate={text}: give 0 (off), a probability or calibrated") from None


def main() -> None:
    from avg_llava_jax.inference.compiling import Compiling

    model = cli.load_model()
    stream = model.stream(
        pictures.refs(IMAGE.value),
        PROMPT.value,
        granularity=granularity_of(GRANULARITY.value),
        cost_weight=COST_WEIGHT.value,
        max_visual_tokens=MAX_VISUAL_TOKENS.value,
        escalate=escalate_of(ESCALATE.value),
        max_new_tokens=MAX_NEW_TOKENS.value,
        temperature=TEMPERATURE.value,
        top_p=TOP_P.value,
        top_k=TOP_K.value,
        seed=SEED.value,
        stop=STOP.value,
        raw=RAW.value,
    )
    with Compiling() as compiling:
        for piece in stream:
            if STREAM.value:
                print(piece, end="", flush=True)
    answer = stream.answer
    print("" if STREAM.value else answer.text)
    if answer.granularity is not None:
        each = answer.granularity if isinstance(answer.granularity, tuple) else (answer.granularity,)
        shares = (
            answer.probabilities if isinstance(answer.probabilities, tuple) else (answer.probabilities,) * len(each)
        )
        for number, (g, share) in enumerate(zip(each, shares, strict=True)):
            chances = "" if share is None else " (" + ", ".join(f"{k}: {p:.2f}" for k, p in share.items()) + ")"
            print(f"image {number}: {g} tokens a tile{chances}")
    for each in answer.passes[:-1]:
        print(f"earlier pass at {each.granularity}: {each.visual_tokens} visual tokens, certainty {each.certainty:.4f}")
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in answer.timings.items())
    counts = f"{answer.visual_tokens} visual tokens, {len(answer.token_ids)} new tokens"
    print(f"{counts}, certainty {answer.certainty:.4f}, {times}, of which {compiling.seconds:.2f} s compiling")


def command() -> None:
    cli.run(main, required=["prompt"])
