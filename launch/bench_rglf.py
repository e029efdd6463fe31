"""What the feedback of RGLF costs, both ways of running it: python -m launch.bench_rglf --batch_size=8

`per_length` runs the frozen language model at each granularity at its own length, `vmap` pads all of them to the
longest. On one batch of `jersey` both are counted (FLOPs of matrix products), then timed in turn; the pyramid that
they read is computed beforehand.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from launch import cli

BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Samples.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 10, "How often each is timed; the median counts.", lower_bound=1)


def counted_flops(language: Any, rows: int, length: int, answer: int) -> int:
    """Of one forward pass over sequences (rows, length) with logits at `answer` positions of each.

    Twice the parameters of the layers a token, twice those of the unembedding an answer token, and the attention's two
    products over all pairs of positions. With width 1, one layer, one head of size 1, MLP width 1, vocabulary 3,
    rows 1, length 2, answer 1: 2*(4 + 3)*2 + 2*3 + 4*2*2 = 50.
    """
    inner, shared = language.heads * language.head_dim, language.kv_heads * language.head_dim
    layer = language.width * (2 * inner + 2 * shared + 3 * language.mlp_width)
    attention = 4 * length * length * inner
    a_row = language.layers * (2 * layer * length + attention) + 2 * language.width * language.vocab_size * answer
    return rows * a_row


def seconds(function: Callable[[], Any]) -> float:
    import jax

    begin = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - begin


def main() -> None:
    import jax

    from avg_llava_jax.data.pipeline import PlannedBatches
    from avg_llava_jax.data.sources import open_sources
    from avg_llava_jax.models import avg_llava
    from avg_llava_jax.training import feedback

    model = cli.load_model()
    config, params, count = model.config, model.params, BATCH_SIZE.value
    parts = open_sources("jersey?split=router&turns=1")
    batch = PlannedBatches(parts, model.tokenizer, config, config.granularities, count, shapes=1)[0]
    batch = jax.device_put({key: value for key, value in batch.items() if key not in feedback.NOT_ARRAYS})
    lengths = [batch["index"][g].shape[1] for g in config.granularities]
    answer = batch["targets"].shape[1]
    flops = {
        "per_length": sum(counted_flops(config.language, count, length, answer) for length in lengths),
        "vmap": len(lengths) * counted_flops(config.language, count, max(lengths), answer),
    }
    each = ", ".join(f"{name} {number / 1e9:.3f} GFLOP" for name, number in flops.items())
    print(f"{count} samples packed to {', '.join(map(str, lengths))}: {each}", flush=True)

    pyramid = jax.jit(lambda params, pixels: avg_llava.pyramid_of(config, params, pixels))(params, batch["pixels"])
    text = avg_llava.embed(config, params, batch["text"])

    def runs(execution: str) -> Callable[[], Any]:
        compiled = jax.jit(
            lambda params, pyramid, text, batch: feedback.answer_feedback(
                config, params, pyramid, text, batch, execution
            )
        )
        return lambda: compiled(params, pyramid, text, batch)

    functions = {name: runs(name) for name in flops}
    nll = {name: np.asarray(function()[0]) for name, function in functions.items()}  # compiles
    if not np.allclose(nll["vmap"], nll["per_length"], rtol=0.05, atol=0.05):
        raise RuntimeError("the two executions disagree: their times compare nothing")
    # In turn, so that whatever else the machine does meets both alike.
    took = [{name: seconds(function) for name, function in functions.items()} for _ in range(REPEATS.value)]
    medians = {name: float(np.median([each[name] for each in took])) for name in functions}
    print(f"{'execution':<12}{'seconds':>10}{'ratio':>10}{'counted':>10}")
    for name, median in medians.items():
        ratios = median / medians["per_length"], flops[name] / flops["per_length"]
        print(f"{name:<12}{median:>10.4f}" + "".join(f"{ratio:>10.2f}" for ratio in ratios))


if __name__ == "__main__":
    cli.run(main, required=[])
