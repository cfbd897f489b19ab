"""How much faster the built-in sampler is than `transformers.generate`, over HTTP, on the same model and the same work.

64 requests as a training step sends them: 8 questions x 8 rollouts, prompts of 290 tokens that share 250, 48 new tokens
each (end-of-sequence ignored on both sides, so both sample the same number), temperature 1, log-probs on. Both sides
include the prefill. Does not cover: adapters, tools, several turns.

    python benchmarks/bench_builtin_sampler.py [--model DIR] [--threads N] [--rounds N]

Without --model it makes random weights in the shape of SmolLM2-135M. The last line is `ratio=…`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script

from app.net.clients import HttpClient, operator_client  # noqa: E402
from app.samplers.client import SamplerClient  # noqa: E402

QUESTIONS, ROLLOUTS, SHARED, PROMPT, NEW, BATCH = 8, 8, 250, 290, 48, 32


def random_model(target: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
        pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target)


def prompts(seed: int) -> list[list[int]]:
    """A new seed is new text, so that no round finds the prefix cache warm."""
    rng = random.Random(seed)
    draw = lambda n: [rng.randrange(10, 49000) for _ in range(n)]  # noqa: E731
    shared = draw(SHARED)
    questions = [shared + draw(PROMPT - SHARED) for _ in range(QUESTIONS)]
    return [q for q in questions for _ in range(ROLLOUTS)]


@contextmanager
def server(model: Path, threads: int) -> Iterator[str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "workers.sampler.builtin", "--model", str(model), "--served-model-name", "bench",
         "--port", str(port), "--dtype", "bfloat16", "--threads", str(threads), "--max-model-len", "2048"],
        cwd=ROOT,
    )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


async def ready(http: HttpClient, url: str) -> None:
    async with asyncio.timeout(120):
        while not await SamplerClient(http, url).health():  # noqa: ASYNC110 - another process, no event
            await asyncio.sleep(0.2)


async def wave(http: HttpClient, url: str, seed: int) -> tuple[float, int]:
    """Seconds and tokens of 64 concurrent requests."""

    async def one(ids: list[int]) -> int:
        body = {"model": "bench", "prompt": ids, "max_tokens": NEW, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
                "logprobs": 0, "return_token_ids": True, "ignore_eos": True}  # fmt: skip
        answer = (await http.post(f"{url}/v1/completions", json=body)).raise_for_status().json()["choices"][0]
        assert len(answer["token_ids"]) == len(answer["logprobs"]["token_logprobs"])
        return len(answer["token_ids"])

    work = prompts(seed)
    begin = time.perf_counter()
    counts = await asyncio.gather(*(one(ids) for ids in work))
    return time.perf_counter() - begin, sum(counts)


async def measure_engine(model: Path, threads: int, rounds: int) -> float:
    rates = []
    with server(model, threads) as url:
        async with operator_client(timeout_s=600) as http:
            await ready(http, url)
            await wave(http, url, seed=0)  # warm-up: oneDNN compiles its kernels for each shape
            for i in range(rounds):
                seconds, tokens = await wave(http, url, seed=1 + i)
                rates.append(tokens / seconds)
                print(
                    f"engine    round {i + 1}: {tokens} tokens in {seconds:.2f} s = {rates[-1]:.0f} tok/s", flush=True
                )
    return statistics.median(rates)


def measure_generate(path: Path, threads: int, rounds: int) -> float:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    rates = []
    for i in range(rounds):
        work = prompts(seed=100 + i)
        begin, tokens = time.perf_counter(), 0
        for at in range(0, len(work), BATCH):
            ids = torch.tensor(work[at : at + BATCH])  # equal lengths: left-padding adds nothing
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=True, temperature=1.0, top_k=0,
                top_p=1.0, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            new = out.sequences[:, PROMPT:]
            logits = torch.stack(out.logits, 1)
            for row in range(len(ids)):  # row by row: 32 x 48 x 49152 fp32 log-probs at once would be 300 MB
                logits[row].float().log_softmax(-1).gather(-1, new[row, :, None])
            tokens += new.numel()
        seconds = time.perf_counter() - begin
        rates.append(tokens / seconds)
        print(f"generate  round {i + 1}: {tokens} tokens in {seconds:.2f} s = {rates[-1]:.0f} tok/s", flush=True)
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a directory with a model; random weights otherwise")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine-only", action="store_true", help="skip transformers.generate (no ratio)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model
        if model is None:
            model = Path(scratch) / "model"
            random_model(model)
        engine = asyncio.run(measure_engine(model, args.threads, args.rounds))
        print(f"engine    {engine:.0f} tok/s (median of {args.rounds}, {args.threads} threads, bf16, over HTTP)")
        if args.engine_only:
            return
        generate = measure_generate(model, args.threads, max(1, args.rounds // 2))
        print(f"generate  {generate:.0f} tok/s (batch {BATCH})")
        print(f"ratio={engine / generate:.2f}")


if __name__ == "__main__":
    main()
