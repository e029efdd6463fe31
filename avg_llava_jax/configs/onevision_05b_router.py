"""RGLF of LLaVA-OneVision 0.5B on one GPU: trains the router on the frozen model's feedback.

`--config.init_from` is the workdir of configs/onevision_05b.py.
"""

from ml_collections import ConfigDict

from avg_llava_jax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.phase = "rglf"
    config.steps = 7800
    config.batch_size = 32
    config.compute_dtype = "bfloat16"
    config.data.shapes = 12
    config.data.workers = 4
    config.optimizer.learning_rate = 1e-3
    config.optimizer.accumulate = 32
    return config
