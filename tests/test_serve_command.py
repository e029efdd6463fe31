"""python -m launch.serve as an operator runs it: a real engine in a process of its own, until SIGTERM."""

import base64
import concurrent.futures
import io
import os
import re
import signal
import subprocess
import sys

import numpy as np
import openai
import pytest
from PIL import Image

from tests.random_model import save_random_model
from tests.test_launch import ROOT, run


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(0)
    sizes = ((32, 16), (16, 40), (30, 30))
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for width, height in sizes]


def link(photo):
    file = io.BytesIO()
    photo.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def test_answers_equal_the_models_until_sigterm_drains(tiny, tokenizer, photos, tmp_path):
    model = save_random_model(tiny, tokenizer, tmp_path / "small")
    key = tmp_path / "key"
    key.write_text("secret\n")
    flags = (f"--checkpoint={tmp_path / 'small'}", "--port=0", "--slots=2", "--max_length=128", "--max_pixels=999",
             f"--api_key_file={key}")  # fmt: skip
    env = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    command = [sys.executable, "-m", "launch.serve", *flags]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        said = ""
        while not (place := re.search(r"small at (\S+)/ and", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        client = openai.OpenAI(base_url=f"{place[1]}/v1", api_key="secret", max_retries=0, timeout=120)

        def ask(question, images, **options):
            content = [*map(link, images), {"type": "text", "text": question}]
            messages = [{"role": "user", "content": content}]
            return client.chat.completions.create(model="small", messages=messages, max_tokens=12, **options)

        cases = [
            ("Who stands left of 4?", photos[:1], {}),
            ("Compare these.", photos[1:], {"granularity": 4}),
            ("What is the weather?", [], {}),
        ]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            bad = [pool.submit(ask, "x", photos[:2], extra_body={"granularity": 5}) for _ in range(3)]
            bad.append(pool.submit(ask, "How large is it?", [Image.new("RGB", (40, 25))]))
            jobs = [pool.submit(ask, question, images, extra_body=extra) for question, images, extra in cases]
            for job, (question, images, extra) in zip(jobs, cases, strict=True):
                plain = model.answer(images, question, max_new_tokens=12, **extra)
                got = job.result()
                assert got.choices[0].message.content == plain.text and got.choices[0].finish_reason == plain.finish
                assert got.usage.completion_tokens == len(plain.token_ids)
                assert got.usage.model_extra["visual_tokens"] == plain.visual_tokens
            assert all(isinstance(job.exception(), openai.BadRequestError) for job in bad)

        stream = ask("Who stands left of 4?", photos[:1], stream=True)
        process.send_signal(signal.SIGTERM)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == model.answer(photos[0], "Who stands left of 4?", max_new_tokens=12).text
        client.close()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stderr.close()


def test_what_cannot_be_served_ends_with_one_line(tmp_path):
    key = tmp_path / "key"
    key.write_text("\n")
    code, _, error = run("serve", f"--api_key_file={key}")
    assert code == 2 and error.startswith(f"error: {key}: the key must be one non-empty line of ASCII"), error
