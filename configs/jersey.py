"""The small model on `jersey`, the data set that draws itself.

    python -m launch.train --config=configs/jersey.py --workdir=W        (`configs/jersey.py:tiny` for a trial)

trains from scratch at the finest granularity; then, from there, multi-granularity and RGLF: see README.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "full") -> ConfigDict:
    if size not in ("full", "tiny"):
        raise ValueError(f"configs/jersey.py:{size}: choose full or tiny")
    config = base.get_config()
    config.steps = 3000
    config.batch_size = 48
    config.checkpoint_every = 200
    config.tokenizer = str(base.ASSETS / "tokenizer")
    config.data.path = "jersey?turns=10&near=0.5"
    config.data.shapes = 4
    config.data.workers = 1
    config.optimizer.learning_rate = 1e-3
    config.optimizer.encoder_learning_rate = 1e-3
    config.optimizer.warmup = 0.05
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.01
    config.rglf.tie_nats = 0.1
    config.model = ConfigDict(
        {
            "vision": {
                "image_size": 96,  # pixels of a tile: an 8 x 8 grid of patches
                "patch_size": 12,
                "width": 128,
                "layers": 5,  # the last is not used
                "heads": 4,
                "mlp_width": 512,
                "activation": "gelu",
            },
            "scaler": {"halvings": 4},  # 64, 32, 16, 8, 4 tokens a tile
            "router": {"attention": "tokens", "text_tokens": 16, "heads": 4, "dropout": 0.1},
            "language": {
                "vocab_size": 600,
                "width": 128,
                "layers": 4,
                "heads": 4,
                "kv_heads": 4,
                "head_dim": 32,
                "mlp_width": 320,
                "tied_embeddings": True,
                "max_length": 1024,
            },
            "pinpoints": ((96, 192), (192, 96), (192, 192), (288, 96), (96, 288)),
            "unpad": "exact",
            "template": "mistral_instruct",
        }
    )
    if size == "tiny":  # seconds instead of hours: to see it run
        config.steps, config.batch_size, config.checkpoint_every = 20, 8, 10
        config.data.shapes, config.data.workers = 1, 0
        config.model.vision.update({"patch_size": 24, "width": 32, "layers": 2, "heads": 2, "mlp_width": 64})
        config.model.scaler.halvings = 2  # a 4 x 4 grid: 16, 8, 4
        config.model.router.heads = 2
        config.model.language.update({"width": 32, "layers": 2, "heads": 2, "kv_heads": 2})
        config.model.language.update({"head_dim": 16, "mlp_width": 64})
    return config
