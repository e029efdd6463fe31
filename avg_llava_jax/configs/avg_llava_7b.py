"""Stage 3 at 7B, multi-granularity visual instruction tuning with the paper's settings: one epoch of a million samples.

`--config.init_from` is a LLaVA-NeXT checkpoint in the released layout, such as liuhaotian/llava-v1.6-vicuna-7b.
Stage 2, visual instruction tuning, is the same config with --config.granularities="(576,)".
"""

from ml_collections import ConfigDict

from avg_llava_jax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.phase = "multi_granularity"
    config.steps = 7800
    config.batch_size = 128
    config.compute_dtype = "bfloat16"
    config.remat = "full"
    config.data.shapes = 12
    config.data.workers = 8
    config.optimizer.learning_rate = 1e-5
    config.optimizer.encoder_learning_rate = 2e-5
    return config
