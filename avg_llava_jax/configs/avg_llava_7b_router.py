"""Stage 4 at 7B, RGLF: trains the router on the frozen model's feedback, with the paper's settings.

`--config.init_from` is the workdir of configs/avg_llava_7b.py.
"""

from ml_collections import ConfigDict

from avg_llava_jax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.phase = "rglf"
    config.steps = 7800
    config.batch_size = 128
    config.compute_dtype = "bfloat16"
    config.data.shapes = 12
    config.data.workers = 8
    config.optimizer.learning_rate = 1e-3
    return config
