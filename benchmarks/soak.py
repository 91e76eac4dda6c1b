"""A server under mixed load for long: is every request answered, does memory stay, does it drain?

    python benchmarks/soak.py MODEL --engine vllm --minutes 10 --json RESULT.json

`besa serve` runs with a key, and clients do by chance (with a seed) what people do: streams that
are read to their end, cut off or read slowly, whole answers, chats, bad requests, wrong keys. Each
answer is held against what it has to be. Memory is the engine's processes' (proportional set size),
each second; its growth is from the second fifth of the time, after the warm-up, to the last one. At
the end SIGTERM comes amidst streams: they have to end whole, and nothing may be left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from common import conditions, write_json

from besa.bench.statistics import percentile
from besa.processes.usage import family, memory_of

KEY = "the key of the soak"
TOKENS = 48
STUCK = 300  # seconds without an answer

# What a client does, and how often.
ACTIONS = {
    "stream": 25,
    "cut off": 30,
    "slow reader": 5,
    "whole": 15,
    "chat": 10,
    "bad request": 8,
    "wrong key": 7,
}
BAD = (
    {"prompt": "a", "max_tokens": "many"},
    {"prompt": "a", "temperature": -1},
    {"prompt": {"a": 1}},
    {"max_tokens": 4},
)


@dataclass
class Soak:
    """The clients' side of a run.

    Attributes:
        url: of the server, up to /v1.
        model: the served model's name.
        done: how many of each action had the answer that it has to have.
        wrong: answers that were not what they have to be, in words.
        first_tokens: when a stream's first token came, and after how many seconds.
    """

    url: str
    model: str
    chat: bool
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    first_tokens: list[tuple[float, float]] = field(default_factory=list)

    async def client(self, seed: int, until: float) -> None:
        """One client, until the time is over."""
        chance = random.Random(seed)
        kinds = [kind for kind in ACTIONS if kind != "chat" or self.chat]
        limits = httpx.Limits(max_connections=1)
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(timeout=STUCK, limits=limits, headers=headers) as http:
            while time.monotonic() < until:
                kind = chance.choices(kinds, [ACTIONS[one] for one in kinds])[0]
                try:
                    await self._act(kind, http, chance)
                except Exception as error:  # noqa: BLE001 - whatever it is, the record has it
                    self.wrong.append(f"{kind}: {type(error).__name__}: {error}")
                else:
                    self.done[kind] += 1

    async def _act(self, kind: str, http: httpx.AsyncClient, chance: random.Random) -> None:
        body = {
            "model": self.model,
            "prompt": " ".join(chance.choices(("def", "import", "class", "the"), k=8)),
            "max_tokens": chance.randint(4, TOKENS),
            "seed": chance.randint(0, 1 << 30),
        }
        if kind in ("stream", "cut off", "slow reader"):
            await self.stream(http, body, chance, kind)
        elif kind == "bad request":
            answer = await http.post(f"{self.url}/completions", json={**chance.choice(BAD)})
            assert answer.status_code in (400, 404, 422), answer.status_code
        elif kind == "wrong key":
            answer = await http.post(
                f"{self.url}/completions", json=body, headers={"Authorization": "Bearer no"}
            )
            assert answer.status_code == 401, answer.status_code
        else:
            path = "completions"
            if kind == "chat":
                path = "chat/completions"
                body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
            answer = await http.post(f"{self.url}/{path}", json=body)
            assert answer.status_code == 200, answer.text[:200]
            assert answer.json()["usage"]["completion_tokens"] <= body["max_tokens"]

    async def stream(
        self, http: httpx.AsyncClient, body: dict[str, Any], chance: random.Random, kind: str
    ) -> None:
        """Reads a stream: to its end, or until it is cut off."""
        began = time.monotonic()
        chunks, last = 0, ""
        leave = chance.randint(1, 6) if kind == "cut off" else None
        request = {**body, "stream": True}
        async with http.stream("POST", f"{self.url}/completions", json=request) as answer:
            assert answer.status_code == 200, (await answer.aread())[:200]
            async for line in answer.aiter_lines():
                if not line:
                    continue
                if not chunks:
                    self.first_tokens.append((began, time.monotonic() - began))
                chunks, last = chunks + 1, line
                if chunks == leave:
                    return
                if kind == "slow reader":
                    await asyncio.sleep(chance.uniform(0.02, 0.2))
        assert last == "data: [DONE]", last[:200]


async def drain(soak: Soak, process: subprocess.Popen[str], clients: int) -> int:
    """SIGTERM amidst streams; gives how many of them ended whole."""
    headers = {"Authorization": f"Bearer {KEY}"}
    chance = random.Random(0)
    body = {"model": soak.model, "prompt": "def ", "max_tokens": TOKENS, "seed": 0}
    body["ignore_eos"] = True
    begun = len(soak.first_tokens)
    async with httpx.AsyncClient(timeout=STUCK, headers=headers) as http:
        streams = [
            asyncio.create_task(soak.stream(http, body, chance, "stream")) for _ in range(clients)
        ]
        while len(soak.first_tokens) < begun + clients and not all(s.done() for s in streams):
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        ends = await asyncio.gather(*streams, return_exceptions=True)
    for end in ends:
        if end is not None:
            soak.wrong.append(f"drain: {type(end).__name__}: {end}")
    return sum(end is None for end in ends)


async def watch(pid: int, until: float, seen: list[tuple[float, int]]) -> None:
    """The bytes that the engine's processes hold, each second."""
    while time.monotonic() < until:
        held = await asyncio.to_thread(lambda: memory_of(family(pid)[1:])["steady"])
        seen.append((time.monotonic(), held or 0))
        await asyncio.sleep(1)


def growth(seen: list[tuple[float, int]]) -> float:
    """By how much the last fifth's median is above the second one's."""
    held = [count for _, count in seen]
    fifth = max(1, len(held) // 5)
    first, last = held[fifth : 2 * fifth] or held, held[-fifth:]
    return statistics.median(last) / statistics.median(first) - 1


def by_parts(first_tokens: list[tuple[float, float]], parts: int = 5) -> list[dict[str, float]]:
    """Median and 99th percentile of the times to the first token, by fifths of the run."""
    if not first_tokens:
        return []
    times = [at for at, _ in first_tokens]
    width = (max(times) - min(times)) / parts or 1
    found = []
    for part in range(parts):
        low = min(times) + part * width
        own = [seconds for at, seconds in first_tokens if low <= at <= low + width]
        if own:
            found.append({"p50": percentile(own, 0.5), "p99": percentile(own, 0.99)})
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole run; gives its record."""
    flags = ["--engine", args.engine, "--port", "0", "--served-model-name", "soaked", *args.flags]
    process = subprocess.Popen(
        [sys.executable, "-m", "besa", "serve", args.model, *flags],
        env={**os.environ, "BESA_API_KEY": KEY, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        found = re.match(r"(http\S+/v1) serves", process.stdout.readline())
        assert found, "the server did not start"
        soak = Soak(found[1], "soaked", chat=not args.no_chat)
        engine = family(process.pid)[1:]
        seen: list[tuple[float, int]] = []

        async def load() -> int:
            until = time.monotonic() + 60 * args.minutes
            clients = [soak.client(seed, until) for seed in range(args.clients)]
            await asyncio.gather(watch(process.pid, until, seen), *clients)
            return await drain(soak, process, min(8, args.clients))

        whole = asyncio.run(load())
        code = process.wait(STUCK)
    finally:
        process.kill()
        process.wait()
    left = [pid for pid in engine if _lives(pid)]
    held = [count for _, count in seen]
    return {
        "engine": args.engine,
        "flags": args.flags,
        "minutes": args.minutes,
        "clients": args.clients,
        "done": dict(soak.done),
        "requests": sum(soak.done.values()) + len(soak.wrong),
        "wrong": soak.wrong,
        "memory": {"growth": growth(seen), "bytes": held[:: len(held) // 50 + 1]},
        "first_token": by_parts(soak.first_tokens),
        "drain": {"streams": min(8, args.clients), "whole": whole, "exit_code": code, "left": left},
        "conditions": conditions(),
    }


def _lives(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("model")
    add("--engine", default="transformers", choices=["vllm", "transformers", "onnx"])
    add("--minutes", type=float, default=10)
    add("--clients", type=int, default=64)
    add("--no-chat", action="store_true", help="of a model without a chat template")
    add("--json", type=Path, required=True)
    args, args.flags = parser.parse_known_args()
    record = run(args)
    write_json(args.json, record)
    shown = {name: record[name] for name in ("done", "wrong", "first_token", "drain")}
    print(json.dumps(shown, indent=1))
    print(f"memory: {record['memory']['growth']:+.1%}")
    return 1 if record["wrong"] or record["drain"]["left"] else 0


if __name__ == "__main__":
    sys.exit(main())
