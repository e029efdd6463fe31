"""Stage 1 at 7B, connector pre-training as in LLaVA-NeXT: images and captions at the finest granularity, one epoch of
558 k samples.

`--config.init_from` is a decoder's folder, such as lmsys/vicuna-7b-v1.5, and `--config.vision_tower` the CLIP folder
to join with it, such as openai/clip-vit-large-patch14-336; encoder and language model are frozen.
The checkpoint keeps the `plain` template: pass the decoder's to the next stage, --config.model.template=vicuna_v1 for a
Vicuna, tokenizer for a Qwen2.
"""

from ml_collections import ConfigDict

from avg_llava_jax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.phase = "connector"
    config.granularities = (576,)
    config.model.template = "plain"
    config.steps = 2180
    config.batch_size = 256
    config.compute_dtype = "bfloat16"
    config.remat = "full"
    config.data.workers = 8
    config.optimizer.learning_rate = 1e-3
    return config
