"""Ablations of the router's training on `jersey`, each with one change:

    configs/ablations.py                        full: configs/jersey.py:router from a newly initialised router
    configs/ablations.py:NAME                   any of `ABLATIONS`

The first five are the paper's (its random choice needs no training). `launch.bench.ablate` runs and compares them all.
"""

from ml_collections import ConfigDict

from avg_llava_jax.configs import jersey
from avg_llava_jax.training.config import defaults

ABLATIONS = {
    "full": {},
    "no_rank_loss": {"rglf.rank_weight": 0.0},
    "no_ce_loss": {"rglf.ce_weight": 0.0},
    "no_instruction": {"model.router.text_tokens": 0},
    "instruction_tuning": {"rglf.rank_weight": 0.0, "rglf.ce_weight": 0.0, "rglf.nll_weight": 1.0},
    "text_4": {"model.router.text_tokens": 4},
    "text_32": {"model.router.text_tokens": 32},
    "margin_0.3": {"rglf.margin": 0.3},
    "margin_3": {"rglf.margin": 3.0},
    "three_granularities": {"model.scaler.halvings": 2},
    "attention_tiles": {"model.router.attention": "tiles"},
    "unpad_released": {"model.unpad": "released"},
    "tie_0": {"rglf.tie_nats": 0.0},
    "tie_0.1": {"rglf.tie_nats": 0.1},
}


def get_config(name: str = "full") -> ConfigDict:
    if name not in ABLATIONS:
        raise ValueError(f"configs/ablations.py:{name}: choose {', '.join(ABLATIONS)}")
    config = jersey.get_config("router")
    config.model = defaults().model  # as in the checkpoint
    config.rglf.nll_weight = 0.0  # RGLF alone
    config.data.path = "jersey?split=router&turns=1&coarse=0.4&near=0.5&size=2048"  # of the table in docs/ablations.md
    config.update_from_flattened_dict(ABLATIONS[name])
    return config
