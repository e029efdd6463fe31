"""Settings of a run with their defaults; an experiment in `configs/` overrides some of them.

    config = defaults()                      # an ml_collections.ConfigDict, for configs/ and --config.key=value
    config.optimizer.learning_rate = 1e-3
    read(config)                             # the same as a TrainConfig, the form that training uses

`model` overrides fields of `ModelConfig`. A field that is None keeps the value of the checkpoint `init_from`, or the
default of `ModelConfig` for fresh parameters.
"""

import dataclasses
import types
import typing
from typing import Any

from ml_collections import ConfigDict, config_dict

from avg_llava_jax.config import ModelConfig, build, nested
from avg_llava_jax.data.images import MAX_PIXELS


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Sources of the samples.

    path: a LLaVA JSON or JSONL; `jersey`, with settings as `jersey?split=router&turns=4`; or several by weight:
      `0.8*a.json, 0.2*jersey`.
    images: folder, zip or tar; one for all paths, or one for each, comma-separated.
    max_pixels: a record with a larger image is skipped.
    max_skipped_share: the run fails if a larger share of the samples is skipped.
    shapes: most batch shapes; each is compiled once, and must save a share of the work, see `pipeline.saving`.
    pack: samples that share a row, on average: less padding where samples differ in length; 1 = a row each.
    workers: processes that read data; 0 = a thread.
    validation: held-out samples, measured every `evaluate_every` steps: a path like `path`, or a share of the records
      of each path such as `0.02`, the same records in every run; "" = none.
    validation_images: folder, zip or tar for a validation path; "" = `images`.
    """

    path: str = ""
    images: str = ""
    max_pixels: int = MAX_PIXELS
    max_skipped_share: float = 0.05
    shapes: int = 6
    pack: int = 1
    workers: int = 0
    validation: str = ""
    validation_images: str = ""

    def __post_init__(self) -> None:
        if self.pack < 1:
            raise ValueError(f"data.pack={self.pack} must be at least 1")
        if self.validation_share is not None and not 0 < self.validation_share < 1:
            raise ValueError(f"data.validation={self.validation}: a share of the records lies between 0 and 1")
        if not 1 <= self.max_pixels <= 2 * MAX_PIXELS:
            raise ValueError(f"data.max_pixels={self.max_pixels} must be in 1 .. {2 * MAX_PIXELS}, Pillow's own bound")
        if self.validation_images and (not self.validation or self.validation_share):
            raise ValueError(
                f"data.validation_images={self.validation_images} has no effect without a path in data.validation"
            )

    @property
    def validation_share(self) -> float | None:
        """The share of held-out records, None without validation or with a validation path."""
        try:
            return float(self.validation)
        except ValueError:
            return None


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters instead of full tuning, see `adapters`; the connector is trained in full.

    rank: of every adapter; 0 = full tuning.
    alpha: x A B is multiplied by alpha / rank; None = 2 * rank.
    dropout: share of an adapter's input that is dropped in training.
    targets: the linears that get an adapter, by component or one by one: ("language/q", "language/v", "encoder");
        () = all of the language model.
    """

    rank: int = 0
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"optimizer.lora.rank={self.rank} must be at least 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"optimizer.lora.dropout={self.dropout} is a share, in [0, 1)")
        for name in ("alpha", "dropout", "targets"):
            if self.rank == 0 and getattr(self, name):
                raise ValueError(
                    f"optimizer.lora.{name}={getattr(self, name)} has no effect with optimizer.lora.rank=0: "
                    "give a rank, or leave it unset"
                )
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"optimizer.lora.alpha={self.alpha} must be over 0")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The targets, the default included; () if the rank is 0."""
        return (self.targets or ("language",)) if self.rank else ()

    @property
    def scale(self) -> float:
        """The factor of x A B, such as 2.0."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW.

    learning_rate: the peak.
    encoder_learning_rate, connector_learning_rate: of these components; None = `learning_rate`, 0 = frozen.
    warmup: share of the steps in which the rate rises from 0; it then falls to 0 along a cosine.
    weight_decay: of kernels and embeddings; norms, biases and single vectors do not decay.
    clip: upper bound on the global norm of the gradients.
    accumulate: micro-batches per batch, run sequentially: less memory, the same result. One CPU device takes at least
        one for every two rows, which is faster there.
    lora: trains adapters instead of encoder and language model.
    """

    learning_rate: float = 1e-5
    encoder_learning_rate: float | None = None
    connector_learning_rate: float | None = None
    warmup: float = 0.03
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0
    accumulate: int = 1
    lora: LoraConfig = LoraConfig()

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"optimizer.warmup={self.warmup} is a share of the steps, in [0, 1)")
        if self.accumulate < 1:
            raise ValueError(f"optimizer.accumulate={self.accumulate} must be at least 1")

    def rate(self, component: str) -> float:
        """The peak learning rate of a component; adapters have that of their component."""
        component = component.removesuffix("_lora")
        own = {"encoder": self.encoder_learning_rate, "connector": self.connector_learning_rate}.get(component)
        return self.learning_rate if own is None else own


@dataclasses.dataclass(frozen=True)
class RglfConfig:
    """RGLF (paper, section 3.5): the loss of the router.

    margin: of the ranking loss. rank_weight, ce_weight: of the ranking loss and of cross-entropy.
    nll_weight: of the expected NLL under the router's probabilities; alone, it replaces RGLF by instruction tuning.
    tie_nats: granularities within this many nats of the best are ties, which rank cheapest first; 0 = paper.
    feedback: folder written by `avg-llava feedback`; "" = the frozen model runs in every step.
    execution: of the frozen model: `per_length` runs each granularity at its own length, `vmap` pads all to the longest
      and maps over them.
    """

    margin: float = 1.0
    rank_weight: float = 1.0
    ce_weight: float = 0.1
    nll_weight: float = 0.0
    tie_nats: float = 0.0
    feedback: str = ""
    execution: str = "per_length"

    def __post_init__(self) -> None:
        if self.execution not in ("per_length", "vmap"):
            raise ValueError(f"rglf.execution={self.execution!r}: choose per_length or vmap")
        if self.tie_nats < 0:
            raise ValueError(f"rglf.tie_nats={self.tie_nats} must not be negative")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh; one of them may be -1: all remaining devices."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run of one phase.

    phase: grounding, connector, multi_granularity or rglf, see `phases`.
    granularities: the granularities to train, such as (64,); () = all of the model's.
    seed: of fresh parameters, of the order of the data and of dropout.
    steps, batch_size: optimizer steps; samples in each, over all devices.
    checkpoint_every: steps between checkpoints.
    evaluate_every: steps between validations; the last step is always validated. 0 = with each checkpoint.
    max_bad_steps: allowed steps with a loss or gradient that is not finite. They change nothing; one more ends the run.
    init_from: a checkpoint of ours or a PyTorch folder; "" = fresh parameters.
    fresh: components to initialise although `init_from` has them, such as ("router",); their shapes may differ.
    vision_tower: the CLIP folder that `init_from` names, or that a Llama is joined with.
    tokenizer: folder, for fresh parameters; `init_from` has its own.
    compute_dtype: float32 or bfloat16; trained parameters are held in float32, frozen ones in this dtype.
    quantize: int8 holds the weights of a frozen language model as int8, see `convert.quantize`; "" = compute_dtype.
    remat: none, dots or full: how much of the forward pass the backward pass recomputes.
    model: overrides of the model: the fields of `ModelConfig`, nested; None = unchanged.
    """

    phase: str = "multi_granularity"
    granularities: tuple[int, ...] = ()
    seed: int = 0
    steps: int = 1000
    batch_size: int = 128
    checkpoint_every: int = 500
    evaluate_every: int = 0
    max_bad_steps: int = 0
    init_from: str = ""
    fresh: tuple[str, ...] = ()
    vision_tower: str = ""
    tokenizer: str = ""
    compute_dtype: str = "float32"
    quantize: str = ""
    remat: str = "none"
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    rglf: RglfConfig = RglfConfig()
    mesh: MeshConfig = MeshConfig()

    @property
    def rows(self) -> int:
        """Rows of a batch, over all devices."""
        return self.batch_size // self.data.pack


def defaults() -> ConfigDict:
    """Every setting with its default."""
    config = _config_dict(TrainConfig)
    config.model = _config_dict(ModelConfig, unset=True)
    return config


def read(config: ConfigDict) -> TrainConfig:
    """The settings of a ConfigDict as a TrainConfig.

    Raises:
      ValueError: names an unknown or invalid setting.
    """
    return build(TrainConfig, config.to_dict(), "config")


def _config_dict(cls: type, unset: bool = False) -> ConfigDict:
    """Fields and defaults of a dataclass; a typed placeholder for None, or for all where `unset`."""
    hints, inner = typing.get_type_hints(cls), nested(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name in inner:
            values[field.name] = _config_dict(inner[field.name], unset)
        elif unset or field.default is None:
            values[field.name] = config_dict.placeholder(_kind(hints[field.name]))
        elif field.default is not dataclasses.MISSING:
            values[field.name] = field.default
    return ConfigDict(values)


def _kind(hint: Any) -> type:
    """The plain type of an annotation: of `float | None` float, of `Literal["a"]` str, of `tuple[int, ...]` tuple."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not type(None))
    elif origin is typing.Literal:
        return type(typing.get_args(hint)[0])
    return typing.get_origin(hint) or hint
