"""Multi-granularity tuning of LLaVA-OneVision 7B on eight or more devices, with the rates of its own last stage.

`--config.init_from` is such as llava-hf/llava-onevision-qwen2-7b-ov-hf. The router learns next, by
avg_llava_7b_router.py from this run's workdir.
"""

from ml_collections import ConfigDict

from avg_llava_jax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.phase = "multi_granularity"
    config.model.language.max_length = 10240  # an image has up to 9 * 729 * 1.21 + 729 visual tokens, and newlines
    config.steps = 7800
    config.batch_size = 128
    config.compute_dtype = "bfloat16"
    config.remat = "full"
    config.data.shapes = 12
    config.data.workers = 8
    config.optimizer.learning_rate = 1e-5
    config.optimizer.encoder_learning_rate = 2e-6
    return config
