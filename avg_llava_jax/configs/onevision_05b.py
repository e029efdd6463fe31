"""Multi-granularity tuning of LLaVA-OneVision 0.5B on one GPU: 729, 378, 196, 98 and 49 tokens a tile of 384 pixels.

`--config.init_from` is a LLaVA-OneVision in the library's layout, such as llava-hf/llava-onevision-qwen2-0.5b-ov-hf, or
in its authors', such as lmms-lab/llava-onevision-qwen2-0.5b-ov. The router learns next, by onevision_05b_router.py.
"""

from ml_collections import ConfigDict

from avg_llava_jax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.phase = "multi_granularity"
    config.model.language.max_length = 10240  # an image has up to 9 * 729 * 1.21 + 729 visual tokens, and newlines
    config.steps = 7800
    config.batch_size = 32
    config.compute_dtype = "bfloat16"
    config.remat = "full"
    config.data.shapes = 12
    config.data.workers = 4
    config.optimizer.learning_rate = 1e-5
    config.optimizer.encoder_learning_rate = 2e-6
    config.optimizer.accumulate = 32
    return config
