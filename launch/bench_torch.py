"""The other side of `launch.bench_inference`: our export in PyTorch, by the transformers library."""

from __future__ import annotations

import importlib.util
import pathlib
import time
from typing import Any


def installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def load(folder: pathlib.Path, threads: int) -> dict[str, Theirs]:
    """`adaptive`, the export's own class, and `llava_next`, the library's, which knows the finest granularity alone."""
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
    """One of the library's models, as a user runs it."""

    def __init__(self, model: Any, processor: Any, adaptive: bool):
        self.model, self.processor, self.adaptive = model, processor, adaptive

    def one_answer(self, image: Any, prompt: str, way: int | str, new_tokens: int) -> dict[str, Any]:
        """Seconds from an image and a question to `total`, all `new_tokens` of a greedy answer, and `ttft`, the first.

        The two are measured by one call each, since `generate` shows nothing before its end.
        """
        ttft, _ = self._timed(image, prompt, way, 1)
        total, token_ids = self._timed(image, prompt, way, new_tokens)
        return {"ttft": ttft, "tpot": (total - ttft) / (new_tokens - 1), "total": total, "token_ids": token_ids}

    def _timed(self, image: Any, prompt: str, way: int | str, new_tokens: int) -> tuple[float, list[int]]:
        import torch

        begin = time.perf_counter()
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        text = self.processor.apply_chat_template([turn])
        inputs = self.processor(images=[image], text=[text], return_tensors="pt").to(self.model.device)
        options = {"granularity": None if way == "auto" else way} if self.adaptive else {}
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs, **options, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
            )
        row = ids[0, inputs["input_ids"].shape[1] :].tolist()
        return time.perf_counter() - begin, row
