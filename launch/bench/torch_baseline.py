"""A training step of AVG-LLaVA in PyTorch, built from the transformers library's modules, as a baseline.

`launch.bench.train` starts it: the work comes as JSON on standard input, seconds go to standard output. Two ways of
encoding are timed alternately, on one device, with random weights:

    encode once                 every image once per step, as in our step
    encode per granularity      once for each granularity, and in RGLF again for the router, as in the released code

The mathematics are those of our step, dropout included: encoder up to the selected hidden state, connector, scaler,
the language model at each granularity at its own length, logits only at the answer's positions, AdamW on fp32
parameters under autocast. Frozen parameters are held in the compute dtype.
"""

import contextlib
import importlib.util
import json
import pathlib
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

MODELING = pathlib.Path(__file__).parents[2] / "avg_llava_jax" / "assets" / "pytorch" / "modeling_avg_llava.py"


def load_router() -> type[nn.Module]:
    """The router class of the file that is exported for PyTorch."""
    spec = importlib.util.spec_from_file_location(MODELING.stem, MODELING)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Router


class Baseline(nn.Module):
    """The whole model. work: sent by `launch.bench.train`; B, T, P, R, L, S, A, D as in our config.py."""

    def __init__(self, work: dict[str, Any]):
        super().__init__()
        model = work["model"]
        vision, width = model["vision"], model["language"]["width"]
        select = vision["select_layer"]
        read = vision["layers"] + 1 + select if select < 0 else select
        self.tower = CLIPVisionModel(CLIPVisionConfig(**work["vision_config"] | {"num_hidden_layers": read}))
        self.connector = nn.Sequential(nn.Linear(vision["width"], width), nn.GELU(), nn.Linear(width, width))
        self.newline = nn.Parameter(torch.randn(width) * width**-0.5)
        self.language = LlamaForCausalLM(LlamaConfig(**work["text_config"]))
        self.granularities, self.halvings = work["granularities"], model["scaler"]["halvings"]
        self.router = load_router()(width, self.granularities, **model["router"])
        self.width_first = model["scaler"]["first_axis"] == "width"
        self.register_buffer("mean", torch.tensor(vision["mean"], dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(vision["std"], dtype=torch.float32), persistent=False)

    def see(self, pixels: Tensor) -> Tensor:
        """uint8 (B, T, H, W, 3) -> the pyramid of every tile, (B, T, R, D), coarsest first."""
        tiles = ((pixels.flatten(0, 1) / 255.0 - self.mean) / self.std).permute(0, 3, 1, 2)
        states = self.tower(tiles.to(self.connector[0].weight.dtype), output_hidden_states=True).hidden_states
        level = self.connector(states[-1][:, 1:])
        side = int(level.shape[1] ** 0.5)
        level = level.unflatten(1, (side, side))
        levels = [level]
        for halving in range(self.halvings):
            halve_width = (halving % 2 == 0) == self.width_first
            level = level.unflatten(2, (-1, 2)).mean(3) if halve_width else level.unflatten(1, (-1, 2)).mean(2)
            levels.append(level)
        return torch.cat([level.flatten(1, 2) for level in reversed(levels)], 1).unflatten(0, pixels.shape[:2])

    def nll(self, pyramid: Tensor, batch: dict[str, Tensor], granularity: int) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of the answers at one granularity, and their numbers of tokens: (B,) each."""
        text = self.language.model.embed_tokens(batch["text"])
        newline = self.newline.to(text.dtype).expand(len(text), 1, -1)
        rows = torch.cat([text, pyramid.flatten(1, 2).to(text.dtype), newline], 1)
        x = rows.take_along_dim(batch[f"index/{granularity}"][..., None], 1)
        hidden = self.language.model(inputs_embeds=x, use_cache=False).last_hidden_state
        at, targets = batch[f"target_at/{granularity}"], batch["targets"]
        logits = self.language.lm_head(hidden.take_along_dim(at.clamp(min=0)[..., None], 1)).float()
        nll = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return torch.where(at >= 0, nll, 0.0).sum(1), (at >= 0).sum(1)

    def route(self, pyramid: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Scores of each sample's one image, (B, G); all of its tile slots are full."""
        text = self.language.model.embed_tokens(batch["text"])
        rows = zip(pyramid, text, batch["instruction"], strict=True)
        return torch.stack([self.router(tiles, words[kept]) for tiles, words, kept in rows])


def feedback_loss(logits: Tensor, nll: Tensor, settings: dict[str, Any]) -> Tensor:
    """RGLF as in `training/rglf.py`, without ties: scores (B, G) and mean answer NLL (B, G) -> scalar."""
    order = torch.argsort(nll, dim=1, stable=True)
    scores, nll = F.log_softmax(logits, 1).gather(1, order), nll.gather(1, order)
    rank = 0.0
    for j in range(1, nll.shape[1]):
        wanted = settings["margin"] * j * (nll[:, j:] - nll[:, :-j])
        rank = rank + (scores[:, j:] - scores[:, :-j] + wanted).clamp(min=0).mean()
    return settings["rank_weight"] * rank - settings["ce_weight"] * scores[:, 0].mean()


class Training:
    """Steps of one phase."""

    def __init__(self, work: dict[str, Any]):
        self.work, self.device = work, torch.device(work["platform"])
        self.dtype = getattr(torch, work["compute_dtype"])
        self.rglf = work["phase"] == "rglf"
        with self.device:
            torch.set_default_dtype(self.dtype if self.rglf else torch.float32)
            self.model = Baseline(work)
            torch.set_default_dtype(torch.float32)
        self.model.eval()  # no dropout but the router's
        if self.rglf:
            self.model.requires_grad_(False)
            self.model.router.float().requires_grad_(True).train()
        else:
            self.model.router.requires_grad_(False)
        if work["remat"] != "none":
            for module in (self.model.tower, self.model.language):
                module.train().gradient_checkpointing_enable({"use_reentrant": False})
        ours = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(ours, work["learning_rate"], weight_decay=0.0, fused=True)
        self.ours = ours

    def step(self, batch: dict[str, Tensor], again: bool) -> Tensor:
        """Run one optimizer step and return the loss. again: encode images for each granularity."""
        self.optimizer.zero_grad(set_to_none=True)
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if half else contextlib.nullcontext():
            loss = self._rglf(batch, again) if self.rglf else self._language(batch, again)
        torch.nn.utils.clip_grad_norm_(self.ours, 1.0)
        self.optimizer.step()
        return loss

    def _language(self, batch: dict[str, Tensor], again: bool) -> Tensor:
        """Mean over tokens, then granularities; frees each granularity's activations before the next runs."""
        model, total = self.model, 0.0
        pyramid = None if again else model.see(batch["pixels"])
        # Gradients of all granularities are gathered here, and go through the encoder once.
        leaf = None if again else pyramid.detach().requires_grad_()
        for granularity in model.granularities:
            seen = model.see(batch["pixels"]) if again else leaf
            nll, count = model.nll(seen, batch, granularity)
            loss = nll.sum() / count.sum() / len(model.granularities)
            loss.backward()
            total = total + loss.detach()
        if not again:
            pyramid.backward(leaf.grad)
        return total

    def _rglf(self, batch: dict[str, Tensor], again: bool) -> Tensor:
        model, feedback = self.model, []
        with torch.no_grad():
            pyramid = model.see(batch["pixels"])
            for granularity in model.granularities:
                seen = model.see(batch["pixels"]) if again else pyramid
                nll, count = model.nll(seen, batch, granularity)
                feedback.append(nll / count)
        loss = feedback_loss(model.route(pyramid, batch), torch.stack(feedback, 1), self.work["rglf"])
        loss.backward()
        return loss.detach()


def read_batch(file: str, device: torch.device) -> dict[str, Tensor]:
    """The arrays of a batch, with indices in PyTorch's dtype."""
    with np.load(file) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]).to(device) for name in arrays.files}
    return {name: each.long() if each.dtype == torch.int32 else each for name, each in tensors.items()}


def measure(work: dict[str, Any]) -> dict[str, Any]:
    """Median seconds of a step for both ways of encoding."""
    if work["platform"] == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"PyTorch {torch.__version__} sees no GPU")
    if work["platform"] not in ("cuda", "cpu"):
        raise ValueError(f"PyTorch is not compared on {work['platform']}")
    training = Training(work)
    batch = read_batch(work["batch"], training.device)
    ways = {"encode once": False, "encode per granularity": True}

    def seconds(again: bool) -> float:
        begin = time.perf_counter()
        training.step(batch, again)
        if training.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    for again in ways.values():
        for _ in range(work["warm_up"]):
            seconds(again)
    took = [{name: seconds(again) for name, again in ways.items()} for _ in range(work["repeats"])]
    medians = {name: float(np.median([each[name] for each in took])) for name in ways}
    return {"step": medians, "torch": torch.__version__, "threads": torch.get_num_threads()}


def main() -> None:
    try:
        print(json.dumps(measure(json.load(sys.stdin))))
    except (ValueError, torch.OutOfMemoryError) as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
