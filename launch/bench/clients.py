"""Point other people's clients at the server, and rewrite their table in docs/serve.md: python -m launch.bench.clients

Each client is installed into a virtual environment of its own below --workdir, from the package index, and sends a few
requests to a server that this script starts. A client that cannot be installed, or fails, is a line that says so.
"""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from avg_llava_jax import SHIPPED
from avg_llava_jax.commands import cli
from avg_llava_jax.files import around, write_whole
from launch.bench.running import running

DOCUMENT = flags.DEFINE_string("document", "docs/serve.md", "Where the table stands.")
WORKDIR = flags.DEFINE_string("workdir", "workdirs/clients", "Keeps the clients' environments and results.")
REQUESTS = flags.DEFINE_integer("requests", 8, "Requests of each client.", lower_bound=2)
CLIENTS_ONLY = flags.DEFINE_list("clients", [], "Run these alone and leave the document; default: all.")
SECONDS = flags.DEFINE_float("seconds", 1800, "Time for an installation or a run.", lower_bound=1)
BEGIN, END = "<!-- clients: python -m launch.bench.clients -->\n", "<!-- end of clients -->\n"
TOKENIZER = SHIPPED.parent / "tokenizer"
ASKING = pathlib.Path(__file__).with_name("asking.py")


@dataclasses.dataclass(frozen=True)
class Client:
    """A client. packages: what it needs, itself first. asks: what its requests use.

    command: (its folder, url, model) -> argv, which runs in an empty folder. read: (that folder, what the command
    printed) -> {"sent", "failed", "first_ms"}.
    """

    packages: tuple[str, ...]
    asks: str
    command: Callable[[pathlib.Path, str, str], list[str]]
    read: Callable[[pathlib.Path, str], dict[str, Any]]
    alone: str | None = None
    """A package that is installed without what it needs."""


def library(name: str, package: str, asks: str, *beside: str) -> Client:
    """A client that `asking.py` asks through."""
    return Client(
        (package, *beside),
        asks,
        lambda folder, url, model: [f"{folder}/bin/python", str(ASKING), name, url, model, str(REQUESTS.value)],
        lambda folder, printed: json.loads(printed.splitlines()[-1]),
    )


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
    # Offline it takes no tokenizer from a folder. Its dozen of processes start slowly where few cores are shared.
    return [
        "env", "-u", "HF_HUB_OFFLINE", "-u", "TRANSFORMERS_OFFLINE",
        "AIPERF_SERVICE_REGISTRATION_TIMEOUT=900", "AIPERF_SERVICE_HEARTBEAT_MISSED_THRESHOLD=100",
        f"{folder}/bin/aiperf", "profile", "--model", model, "--url", url, "--endpoint-type", "chat", "--streaming",
        "--tokenizer", str(TOKENIZER), "--request-count", str(REQUESTS.value), "--concurrency", "2",
        "--synthetic-input-tokens-mean", "32", "--output-tokens-mean", "8",
        "--image-width-mean", "120", "--image-height-mean", "80",
        "--extra-inputs", "ignore_eos:true", "--extra-inputs", "min_tokens:8",
        "--workers-max", "1", "--record-processors", "1", "--ui-type", "none", "--artifact-dir", "artifacts",
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
    "openai": library(
        "openai",
        "openai>=3.57,<4",
        "chat completions and responses with an image, completions, streamed; a conversation that greets first, `n`, "
        "`json_schema`",
    ),
    "litellm": library(
        "litellm", "litellm>=1.110,<1.111", "streaming, `json_schema`, `ContextWindowExceededError` over the length"
    ),
    "langchain-openai": library(
        "langchain", "langchain-openai>=1.7,<1.8", "`stream`, `with_structured_output` by each of its three methods"
    ),
    "instructor": library("instructor", "instructor>=1.17,<1.18", "the modes `JSON_SCHEMA`, `JSON`, `TOOLS`"),
    "lm-eval": library("lm_eval", "lm-eval[api]>=0.4.13,<0.4.14", "`local-chat-completions`, messages of 0.4.9"),
    "guidellm": Client(
        ("guidellm>=0.8,<0.9",), "chat completions, `ignore_eos`, `continuous_usage_stats`", _guidellm, _of_guidellm
    ),
    "aiperf": Client(
        ("aiperf>=0.13,<0.14",), "chat completions with an image, `ignore_eos`, `min_tokens`", _aiperf, _of_aiperf
    ),
    "sglang": Client(
        NEEDED,
        "`bench_serving`: chat completions, `ignore_eos`, prompts of random tokens, some of them blank",
        _sglang,
        _of_sglang,
        alone="sglang>=0.5.5,<0.5.6",  # with them it needs a GPU
    ),
}


def install(folder: pathlib.Path, client: Client) -> None:
    """Install a client into `folder`, unless an earlier run did, by uv: pip takes minutes to resolve some."""
    stamp, wanted = folder / "installed", "\n".join([*client.packages, client.alone or ""])
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    python = f"{folder}/bin/python"
    run([sys.executable, "-m", "venv", str(folder)])
    run([python, "-m", "pip", "install", "--quiet", "uv"])
    pip = [python, "-m", "uv", "pip", "install", "--quiet", "--python", python]
    run([*pip, *client.packages])
    if client.alone:
        run([*pip, "--no-deps", client.alone])
    stamp.write_text(wanted)


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
    with running("--slots=2", f"--checkpoint={pathlib.Path(cli.CHECKPOINT.value).absolute()}") as server:
        rows = [row(name, server.url, server.model) for name in CLIENTS_ONLY.value or CLIENTS]
    table = "| client | asks for | requests | failed | ms to the first piece |\n|---|---|---|---|---|\n" + "".join(rows)
    print(table, file=sys.stderr)
    if not CLIENTS_ONLY.value:
        write_whole(DOCUMENT.value, before + table + after)


if __name__ == "__main__":
    cli.run(main, required=[])
