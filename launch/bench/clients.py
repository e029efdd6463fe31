"""Point other people's clients at the server, and rewrite their table in docs/serve.md: python -m launch.bench.clients

Each client is installed into a virtual environment of its own below --workdir, from the package index, and sends a few
requests to a server that this script starts. A client that cannot be installed, or fails, is a line that says so.
"""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from avg_llava_jax import SHIPPED
from avg_llava_jax.commands import cli
from avg_llava_jax.files import around, write_whole

DOCUMENT = flags.DEFINE_string("document", "docs/serve.md", "Where the table stands.")
WORKDIR = flags.DEFINE_string("workdir", "workdirs/clients", "Keeps the clients' environments and results.")
REQUESTS = flags.DEFINE_integer("requests", 8, "Requests of each client.", lower_bound=2)
CLIENTS_ONLY = flags.DEFINE_list("clients", [], "Run these alone and leave the document; default: all.")
SECONDS = flags.DEFINE_float("seconds", 1800, "Time for an installation or a run.", lower_bound=1)
BEGIN, END = "<!-- clients: python -m launch.bench.clients -->\n", "<!-- end of clients -->\n"
TOKENIZER = SHIPPED.parent / "tokenizer"

OPENAI = """
import base64, io, json, statistics, sys, time, zlib, struct
import openai

url, model, requests = sys.argv[1], sys.argv[2], int(sys.argv[3])
client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=300)

def png(side):
    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = b"".join(b"\\0" + bytes([y % 256, 99, 50]) * side for y in range(side))
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\\x89PNG\\r\\n\\x1a\\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")

image = "data:image/png;base64," + base64.b64encode(png(120)).decode()
content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "Who wears 7?"}]
items = [{"type": "input_image", "image_url": image}, {"type": "input_text", "text": "Who wears 7?"}]
kinds = [
    lambda: client.chat.completions.create(model=model, messages=[{"role": "user", "content": content}], stream=True),
    lambda: client.responses.create(model=model, input=[{"role": "user", "content": items}], stream=True),
    lambda: client.completions.create(model=model, prompt="Who wears 7?", stream=True),
]
first, failed = [], 0
for number in range(requests):
    begin = time.perf_counter()
    try:
        stream = kinds[number % len(kinds)]()
        next(iter(stream))
        first.append(1e3 * (time.perf_counter() - begin))
        for _ in stream:
            pass
    except openai.OpenAIError as error:
        print(error, file=sys.stderr)
        failed += 1
print(json.dumps({"sent": requests, "failed": failed, "first_ms": statistics.median(first) if first else None}))
"""


@dataclasses.dataclass(frozen=True)
class Client:
    """A client. packages: what pip installs. asks: what its requests use.

    command: (its folder, url, model) -> argv, which runs in an empty folder. read: (that folder, what the command
    printed) -> {"sent", "failed", "first_ms"}.
    """

    packages: tuple[str, ...]
    asks: str
    command: Callable[[pathlib.Path, str, str], list[str]]
    read: Callable[[pathlib.Path, str], dict[str, Any]]


def _openai(folder: pathlib.Path, url: str, model: str) -> list[str]:
    return [f"{folder}/bin/python", "-c", OPENAI, url, model, str(REQUESTS.value)]


def _guidellm(folder: pathlib.Path, url: str, model: str) -> list[str]:
    return [
        f"{folder}/bin/guidellm", "run", "--disable-progress",
        "--backend", f"kind=openai_http,target={url},model={model},request_format=/v1/chat/completions",
        "--profile", "kind=concurrent,streams=2",
        "--constraint", f"kind=max_requests,count={REQUESTS.value}",
        "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8",
        "--tokenizer", f"kind=huggingface_auto,model={TOKENIZER}",
    ]  # fmt: skip


def _of_guidellm(folder: pathlib.Path, _: str) -> dict[str, Any]:
    (benchmark,) = json.loads((folder / "benchmarks.json").read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    totals, first = metrics["request_totals"], metrics["time_to_first_token_ms"]["successful"]
    return {"sent": totals["total"], "failed": totals["total"] - totals["successful"], "first_ms": first["median"]}


def _aiperf(folder: pathlib.Path, url: str, model: str) -> list[str]:
    return [
        f"{folder}/bin/aiperf", "profile", "--model", model, "--url", url, "--endpoint-type", "chat", "--streaming",
        "--tokenizer", str(TOKENIZER), "--request-count", str(REQUESTS.value), "--concurrency", "2",
        "--synthetic-input-tokens-mean", "32", "--output-tokens-mean", "8",
        "--image-width-mean", "120", "--image-height-mean", "80",
        "--extra-inputs", "ignore_eos:true", "--extra-inputs", "min_tokens:8",
        "--ui-type", "none", "--artifact-dir", "artifacts",
    ]  # fmt: skip


def _of_aiperf(folder: pathlib.Path, _: str) -> dict[str, Any]:
    found = json.loads((folder / "artifacts" / "profile_export_aiperf.json").read_text())
    good, failed = (int((found.get(name) or {"avg": 0})["avg"]) for name in ("request_count", "error_request_count"))
    return {"sent": good + failed, "failed": failed, "first_ms": found["time_to_first_token"]["p50"]}


def _sglang(folder: pathlib.Path, url: str, model: str) -> list[str]:
    (script,) = folder.glob("lib/python*/site-packages/sglang/bench_serving.py")  # the rest of sglang needs a GPU
    return [
        f"{folder}/bin/python", str(script), "--backend", "sglang-oai-chat", "--base-url", url, "--model", model,
        "--tokenizer", str(TOKENIZER), "--dataset-name", "random-ids", "--num-prompts", str(REQUESTS.value),
        "--random-input-len", "32", "--random-output-len", "8", "--random-range-ratio", "1", "--max-concurrency", "2",
        "--output-file", "result.jsonl", "--disable-tqdm",
    ]  # fmt: skip


def _of_sglang(folder: pathlib.Path, _: str) -> dict[str, Any]:
    found = json.loads((folder / "result.jsonl").read_text().splitlines()[-1])
    return {
        "sent": REQUESTS.value,
        "failed": REQUESTS.value - found["completed"],
        "first_ms": found["median_ttft_ms"],
    }


NEEDED = ("aiohttp", "numpy", "pybase64", "requests", "datasets", "pillow", "tqdm", "transformers>=5")
CLIENTS = {
    "openai": Client(
        ("openai>=3.57,<4",),
        "chat completions, responses with an image, completions; streamed",
        _openai,
        lambda folder, printed: json.loads(printed.splitlines()[-1]),
    ),
    "guidellm": Client(
        ("guidellm>=0.8,<0.9",), "chat completions, `ignore_eos`, `continuous_usage_stats`", _guidellm, _of_guidellm
    ),
    "aiperf": Client(
        ("aiperf>=0.13,<0.14",), "chat completions with an image, `ignore_eos`, `min_tokens`", _aiperf, _of_aiperf
    ),
    "sglang": Client(
        ("sglang>=0.5.5,<0.5.6", *NEEDED), "`bench_serving`: chat completions, `ignore_eos`", _sglang, _of_sglang
    ),
}


def install(folder: pathlib.Path, client: Client) -> None:
    """Install a client into `folder`, unless an earlier run did, by uv: pip takes minutes to find what goes together."""
    if (folder / "installed").is_file():
        return
    python = f"{folder}/bin/python"
    run([sys.executable, "-m", "venv", str(folder)])
    run([python, "-m", "pip", "install", "--quiet", "uv"])
    pip = [python, "-m", "uv", "pip", "install", "--quiet", "--python", python]
    run([*pip, *client.packages])
    if client.alone:
        run([*pip, "--no-deps", client.alone])
    (folder / "installed").touch()


def run(command: list[str], folder: pathlib.Path | None = None) -> str:
    """The standard output of a command. Raises RuntimeError with the end of what it said if it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS.value)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip() or "no message")[-2000:])
    return done.stdout


def version(folder: pathlib.Path, name: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    return run([f"{folder}/bin/python", "-c", code]).strip()


def row(name: str, url: str, model: str) -> str:
    """Install and run a client: its line of the table."""
    client, folder = CLIENTS[name], pathlib.Path(WORKDIR.value).absolute() / name
    try:
        install(folder, client)
        results = folder / "results"
        shutil.rmtree(results, ignore_errors=True)
        results.mkdir()
        begin = time.monotonic()
        found = client.read(results, run(client.command(folder, url, model), results))
        print(f"{name}: {found} in {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        if not found["sent"]:
            raise RuntimeError("it sent nothing")
        first = "–" if found["first_ms"] is None else f"{found['first_ms']:.0f}"
        return f"| {name} {version(folder, name)} | {client.asks} | {found['sent']} | {found['failed']} | {first} |\n"
    except (RuntimeError, OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        reason = " ".join(str(error).split())[-120:].replace("|", "/")
        return f"| {name} | {client.asks} | – | – | not run: {reason} |\n"


def main() -> None:
    before, after = around(DOCUMENT.value, BEGIN, END)  # fail before anything is installed
    command = [sys.executable, "-m", "launch.serve", "--port=0", "--slots=2", f"--checkpoint={cli.CHECKPOINT.value}"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        while not (place := re.search(r"^(\S+) at (\S+)/ and", line := server.stderr.readline())):
            if not line:
                raise RuntimeError("the server did not start: python -m launch.serve says why")
        model, url = place.groups()
        threading.Thread(target=server.stderr.read, daemon=True).start()  # else a full pipe would stop the server
        names = CLIENTS_ONLY.value or list(CLIENTS)
        rows = [row(name, url, model) for name in names]
    finally:
        server.terminate()
        server.wait()
    table = "| client | asks for | requests | failed | ms to the first piece |\n|---|---|---|---|---|\n" + "".join(rows)
    print(table, file=sys.stderr)
    if not CLIENTS_ONLY.value:
        write_whole(DOCUMENT.value, before + table + after)


if __name__ == "__main__":
    cli.run(main, required=[])
