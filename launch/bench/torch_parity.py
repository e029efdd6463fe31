"""The PyTorch side of `launch.bench.inference`: our export, run by the transformers library."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any


def installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def load(folder: pathlib.Path, threads: int) -> dict[str, Theirs]:
    """Load both: `adaptive`, the export's class, and `llava_next`, the library's with only the finest granularity."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaNextForConditionalGeneration

    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(folder)
    adaptive = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    plain = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype="auto")
    return {
        "adaptive": Theirs(adaptive.to(device).eval(), processor, True),
        "llava_next": Theirs(plain.to(device).eval(), processor, False),
    }


class Theirs:
    """One of the two models, run as a user would."""

    def __init__(self, model: Any, processor: Any, adaptive: bool):
        self.model, self.processor, self.adaptive = model, processor, adaptive

    def answer(self, image: Any, prompt: str, way: int | str, new_tokens: int) -> dict[str, Any]:
        """A greedy answer of a given number of tokens, from an image and a question."""
        import torch

        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        text = self.processor.apply_chat_template([turn])
        inputs = self.processor(images=[image], text=[text], return_tensors="pt").to(self.model.device)
        options = {"granularity": None if way == "auto" else way} if self.adaptive else {}
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs, **options, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
            )
        return {"token_ids": ids[0, inputs["input_ids"].shape[1] :].tolist()}
