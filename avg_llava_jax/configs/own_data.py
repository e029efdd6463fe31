"""The jersey-sized model on your own LLaVA JSON, in two phases:

    avg-llava train --config=configs/own_data.py --workdir=W1 \\
        --config.data.path=train.json --config.data.images=DIR
    avg-llava train --config=configs/own_data.py --workdir=W2 \\
        --config.data.path=train.json --config.data.images=DIR --config.phase=rglf --config.init_from=W1

The first command tunes the model at all granularities, the second trains the router that chooses among them.
"""

from ml_collections import ConfigDict

from avg_llava_jax import ASSETS
from avg_llava_jax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.init_from = str(ASSETS / "jersey")  # the shipped model
    config.steps = 500
    config.batch_size = 16
    config.checkpoint_every = 100
    config.data.shapes = 3
    config.data.workers = 1
    config.optimizer.learning_rate = 5e-4
    config.rglf.tie_nats = 0.1
    return config
