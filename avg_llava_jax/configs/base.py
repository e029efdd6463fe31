"""What every config has; the others change values and the model, and add no keys elsewhere."""

import pathlib

from ml_collections import ConfigDict, config_dict

import avg_llava_jax

ASSETS = pathlib.Path(avg_llava_jax.__file__).parent / "assets"


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "phase": "multi_granularity",  # grounding | connector | multi_granularity | rglf
            "granularities": (),  # those that the phase trains, as (64,); () = all of the model's
            "seed": 0,
            "steps": 1000,
            "batch_size": 128,  # samples a step, over all devices
            "checkpoint_every": 500,  # steps
            "max_bad_steps": 0,  # steps passed over, unchanged, because their loss is not finite; one more ends the run
            "init_from": "",  # a checkpoint of ours or a PyTorch folder; "" = fresh parameters
            "fresh": (),  # components that begin anew all the same, as ("router",): they may have another form
            "vision_tower": "",  # the CLIP folder that init_from names, or that a Llama is joined with
            "tokenizer": "",  # folder for fresh parameters; init_from brings its own
            "compute_dtype": "float32",  # float32 | bfloat16; what learns is held in float32, what is frozen in this
            "remat": "none",  # none | dots | full: how much of the forward pass is computed again in the backward pass
            "data": {
                # LLaVA JSON or JSONL; or `jersey`, with settings as `jersey?split=router&turns=4`;
                # or several by weight: `0.8*a.json, 0.2*jersey`.
                "path": "",
                "images": "",  # folder, zip or tar; one for all paths, or one for each, comma-separated
                "max_pixels": 89_478_485,  # an image with more counts as bad
                "max_skipped_share": 0.05,  # stop where more of the samples cannot be used
                "shapes": 6,  # batch shapes; each is compiled once, fewer of them mean more padding
                "workers": 0,  # processes that read data; 0 = a thread
            },
            "optimizer": {
                "learning_rate": 1e-5,
                "encoder_learning_rate": 2e-5,  # 0 = the vision encoder is frozen
                "connector_learning_rate": config_dict.placeholder(float),  # 0 = frozen; unset = like the rest
                "warmup": 0.03,  # share of the steps, then a cosine to 0
                "weight_decay": 0.0,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "clip": 1.0,  # global norm
                "accumulate": 1,  # micro-batches a step: less memory, the same result
            },
            "rglf": {
                "margin": 1.0,
                "rank_weight": 1.0,
                "ce_weight": 0.1,
                "nll_weight": 0.0,  # of the answer's NLL expected under the router's probabilities: instruction tuning
                "tie_nats": 0.0,  # this close to the best is as good, and the cheapest of those wins; 0 = paper
                "feedback": "",  # folder made by `avg-llava feedback`; "" = the frozen model is asked on the way
                "execution": "per_length",  # per_length | vmap
            },
            # Sizes of the device mesh; -1 = all that is left.
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
        }
    )


def as_in_checkpoint() -> ConfigDict:
    """`model` of a config that starts from a checkpoint: None = as there; `--config.model.unpad=released` overrides."""
    unset = config_dict.placeholder  # a new one for each: placeholders that are shared change together
    return ConfigDict(
        {
            "unpad": unset(str),
            "template": unset(str),
            "pinpoints": unset(tuple),
            "scaler": {"halvings": unset(int)},  # another ladder, or router, needs fresh=("router",)
            "router": {"attention": unset(str), "text_tokens": unset(int), "dropout": unset(float)},
            "language": {"max_length": unset(int)},
        }
    )
