"""An OpenAI-compatible server that computes nothing: known delays, known answers, known faults.

    python tests/bench/stub.py --ttft 0.05 --itl 0.01 --port 8001

It writes when it really received a request and really sent each token, and by how much it was late
with it (`--journal FILE`, seconds of the clock that `time.perf_counter` reads, which all processes
of a machine share), so that a test can tell the load generator's error from a busy machine's.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import socket
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Stub:
    """The server's state: what it was asked to do, and how many requests it has answered."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.slots = asyncio.Semaphore(arguments.slots)
        self.requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                received = time.perf_counter()
                lines = head.decode().split("\r\n")
                method, path, _ = lines[0].split()
                headers = {
                    k.lower(): v.strip() for k, _, v in (x.partition(":") for x in lines[1:])
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if not _is_uuid(headers.get("x-request-id")):  # as llama-cpp-python's server has it
                    await self.answer(writer, 400, {"error": {"message": "x-request-id"}})
                elif method == "POST" and path == "/v1/completions":
                    if not await self.complete(json.loads(body), received, writer):
                        break
                elif path == "/v1/models":
                    model = {"id": self.arguments.name, "object": "model", "created": 0}
                    await self.answer(writer, 200, {"object": "list", "data": [model]})
                else:
                    await self.answer(writer, 200 if path == "/health" else 404, {})
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, writer: asyncio.StreamWriter, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()

    def tokens(self, prompt: str, count: int) -> list[str]:
        """The answer: the same for the same prompt, unless the fault is that it is not."""
        salt = f"{self.requests}" if self.arguments.fault == "unstable" else self.arguments.salt
        digest = hashlib.sha256(f"{salt}{prompt}".encode()).digest() * (count // 32 + 1)
        return [" " + WORDS[byte % 10] for byte in digest[:count]]

    async def complete(
        self, body: dict[str, Any], received: float, writer: asyncio.StreamWriter
    ) -> bool:
        self.requests += 1
        arguments, faulty = self.arguments, self.requests > self.arguments.after
        if faulty and arguments.fault == "die":
            os._exit(7)
        if faulty and arguments.fault == "hang":
            await asyncio.sleep(3600)
        if faulty and arguments.fault == "error":
            await self.answer(writer, 500, {"error": {"message": "out of order"}})
            return True
        prompt = body["prompt"] if isinstance(body["prompt"], str) else json.dumps(body["prompt"])
        tokens = self.tokens(prompt, int(body.get("max_tokens", 16)))
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(tokens)}
        async with self.slots:
            started, sent, late = time.perf_counter(), [], []
            if not body.get("stream"):
                await asyncio.sleep(arguments.ttft + arguments.itl * (len(tokens) - 1))
                choice = {"index": 0, "text": "".join(tokens), "finish_reason": "length"}
                await self.answer(writer, 200, {"id": "x", "choices": [choice], "usage": usage})
                return True
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n"
            )
            for index, token in enumerate(tokens):
                due = started + arguments.ttft + index * arguments.itl
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                reason = "length" if index + 1 == len(tokens) else None
                choice = {"index": 0, "text": token, "finish_reason": reason}
                sent.append(time.perf_counter())
                late.append(sent[-1] - due)
                await self.event(writer, json.dumps({"id": "x", "choices": [choice]}))
            await self.event(writer, json.dumps({"id": "x", "choices": [], "usage": usage}))
            await self.event(writer, "[DONE]")
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        if arguments.journal:
            with Path(arguments.journal).open("a") as file:
                line = {"prompt": prompt, "received": received, "sent": sent, "late": late}
                file.write(json.dumps(line) + "\n")
        return True

    @staticmethod
    async def event(writer: asyncio.StreamWriter, data: str) -> None:
        chunk = f"data: {data}\n\n".encode()
        writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        await writer.drain()


def _is_uuid(words: str | None) -> bool:
    """Whether it is one, if there is any."""
    with suppress(ValueError):
        return words is None or bool(uuid.UUID(words))
    return False


async def main(arguments: argparse.Namespace) -> None:
    if arguments.fault == "never":
        await asyncio.sleep(3600)
    if arguments.fault == "stillborn":
        sys.exit("RuntimeError: there is no such device")
    server = await asyncio.start_server(
        Stub(arguments).serve, "127.0.0.1", arguments.port, family=socket.AF_INET, backlog=512
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--name", default="stub")
    parser.add_argument("--ttft", type=float, default=0.02)
    parser.add_argument("--itl", type=float, default=0.005)
    parser.add_argument("--slots", type=int, default=1000, help="requests answered at a time")
    parser.add_argument("--fault", help="die, hang, error, unstable, never, stillborn")
    parser.add_argument("--after", type=int, default=0, help="requests before the fault")
    parser.add_argument("--salt", default="", help="stubs of different salt answer differently")
    parser.add_argument("--journal")
    return parser.parse_args(argv)


if __name__ == "__main__":
    asyncio.run(main(parse(sys.argv[1:])))
