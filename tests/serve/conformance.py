"""What every engine has to answer, and official clients as they are used: for each test server.

Requests are held against a plain loop over the dense model's logits, so that what holds for two
engines holds between them. The tests are collected in test_serve.py and onnx/test_server.py, each
with its own servers.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import PATIENCE
from tests.serve import serving
from tests.serve.serving import NEW_TOKENS, PROMPTS, Served, dense_model

CONTEXT = 256
USER = {"role": "user", "content": "import os"}
PARTS = [{"type": "text", "text": "import os"}, {"type": "text", "text": "import re"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
STOPPED = "import os\n"

# Bodies by name, each with temperature 0 and the model's name on top.
COMPLETIONS: dict[str, dict[str, Any]] = {
    **{f"prompt {n}": {"prompt": text, "max_tokens": NEW_TOKENS} for n, text in enumerate(PROMPTS)},
    "16 tokens by default": {"prompt": PROMPTS[0]},
    "a list of one": {"prompt": [PROMPTS[0]]},
    "a list of three": {"prompt": PROMPTS[:3], "max_tokens": 9},
    "token numbers": {"prompt": [5, 300, 17], "max_tokens": 9},
    "lists of token numbers": {"prompt": [[5, 300, 17], [42]], "max_tokens": 9},
    "two answers": {"prompt": PROMPTS[1], "n": 2, "max_tokens": 9},
    "two answers to two": {"prompt": PROMPTS[:2], "n": 2, "max_tokens": 9},
    "echo": {"prompt": PROMPTS[2], "echo": True},
    "a stop string": {"prompt": STOPPED, "stop": "os", "max_tokens": NEW_TOKENS},
    "stop strings": {"prompt": STOPPED, "stop": ["zzz", "("], "max_tokens": NEW_TOKENS},
    "stop tokens": {"prompt": STOPPED, "stop_token_ids": [199], "max_tokens": NEW_TOKENS},
    "no stop string": {"prompt": PROMPTS[0], "stop": []},
    "greedy with top_p": {"prompt": PROMPTS[0], "top_p": 0.95},
    "greedy with top_k": {"prompt": PROMPTS[0], "top_k": 5},
    "greedy with a seed": {"prompt": PROMPTS[0], "seed": 7},
    "greedy with min_p": {"prompt": PROMPTS[0], "min_p": 0.1},
    "penalties of nothing": {"prompt": "a", "frequency_penalty": 0, "presence_penalty": 0.0},
    "frequency": {"prompt": "a a a", "frequency_penalty": 1.5, "max_tokens": NEW_TOKENS},
    "presence": {"prompt": "a a a", "presence_penalty": -1.5, "max_tokens": NEW_TOKENS},
    "repetition": {"prompt": PROMPTS[0], "repetition_penalty": 1.3, "max_tokens": NEW_TOKENS},
    "a bias": {"prompt": PROMPTS[0], "logit_bias": {"300": 100}, "max_tokens": 3},
    "a bias for the end": {"prompt": PROMPTS[0], "logit_bias": {"0": 100}},
    "least tokens": {"prompt": PROMPTS[3], "min_tokens": 5},
    "no end": {"prompt": PROMPTS[3], "ignore_eos": True, "max_tokens": 20},
    "more than fits": {"prompt": PROMPTS[4], "max_tokens": CONTEXT, "ignore_eos": True},
    "one token": {"prompt": PROMPTS[4], "max_tokens": 1},
    "a user": {"prompt": PROMPTS[4], "user": "me", "n": 1, "suffix": None, "logprobs": None},
}
CHATS: dict[str, dict[str, Any]] = {
    "a message": {"messages": [USER], "max_tokens": NEW_TOKENS},
    "several": {
        "messages": [{"role": "system", "content": "Modules:"}, USER],
        "max_tokens": NEW_TOKENS,
    },
    "parts of text": {"messages": [{"role": "user", "content": PARTS}], "max_tokens": 9},
    "one part of text": {"messages": [{"role": "user", "content": PARTS[:1]}], "max_tokens": 9},
    "the newer limit": {"messages": [USER], "max_completion_tokens": 3},
    "all that is left": {"messages": [USER]},
    "a stop string in a chat": {"messages": [USER], "stop": ["("], "max_tokens": NEW_TOKENS},
    "two answers in a chat": {"messages": [USER], "n": 2, "max_tokens": 5},
    "no calls": {
        "messages": [USER, {"role": "assistant", "content": "Yes", "tool_calls": []}, USER],
        "max_tokens": 5,
    },
    "no generation prompt": {"messages": [USER], "add_generation_prompt": False, "max_tokens": 5},
    "no tools": {"messages": [USER], "tools": [], "logprobs": False, "max_tokens": 5},
}
REFUSED: dict[str, tuple[int, dict[str, Any]]] = {
    "another model": (404, {"model": "another", "prompt": "a"}),
    "a prompt that is too long": (400, {"prompt": "word " * 4 * CONTEXT}),
    "an image": (400, {"messages": [{"role": "user", "content": [IMAGE]}]}),
    "a message of another type": (400, {"messages": [{"role": "user", "content": 5}]}),
    "what comes behind": (400, {"prompt": "a", "suffix": "b"}),
    "a form that is none": (400, {"prompt": "a", "structured_outputs": {"regex": "(["}}),
    "a probability of nothing": (400, {"prompt": "a", "top_p": 0}),
}
ASKED = {**COMPLETIONS, **CHATS}


@dataclass
class Expected:
    """What a request's answers are."""

    texts: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    new_tokens: int = 0


@cache
def expected(dense: Path, name: str) -> Expected:
    """Of a body in `ASKED`, by a loop over the dense model's logits: once for all servers."""
    body, (_, tokenizer) = ASKED[name], dense_model(dense)
    found = Expected()
    for prompt, shown in _prompts(tokenizer, body):
        most = body.get("max_completion_tokens") or body.get("max_tokens")
        room = CONTEXT - len(prompt)
        most = min(most or (room if "messages" in body else 16), room)
        text, tokens, reason = _continued(dense, prompt, most, body)
        n = body.get("n", 1)
        found.texts += [(shown if body.get("echo") else "") + text] * n
        found.reasons += [reason] * n
        found.new_tokens += tokens * n
        found.prompt_tokens += len(prompt)
    return found


def _prompts(tokenizer: Any, body: dict[str, Any]) -> list[tuple[list[int], str]]:
    if "messages" in body:
        contents = [message["content"] for message in body["messages"]]
        lines = [x if isinstance(x, str) else "\n".join(p["text"] for p in x) for x in contents]
        given: Any = ["".join(f"{line}\n" for line in lines)]
    else:
        given = body["prompt"]
        if isinstance(given, str) or isinstance(given[0], int):
            given = [given]
    return [
        (tokenizer(one)["input_ids"], one) if isinstance(one, str) else (one, tokenizer.decode(one))
        for one in given
    ]


def _continued(
    dense: Path, prompt: list[int], most: int, body: dict[str, Any]
) -> tuple[str, int, str]:
    """The text, how many tokens it took, and why it ended."""
    model, tokenizer = dense_model(dense)
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    least = most if body.get("ignore_eos") else body.get("min_tokens", 0)
    new: list[int] = []
    while len(new) < most:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *new]]), logits_to_keep=1).logits
        scores = logits[0, -1].double()
        for token, bias in body.get("logit_bias", {}).items():
            scores[int(token)] += bias
        factor = body.get("repetition_penalty", 1.0)
        for token in {*prompt, *new}:
            scores[token] *= 1 / factor if scores[token] > 0 else factor
        for token, count in Counter(new).items():
            scores[token] -= body.get("frequency_penalty", 0) * count
            scores[token] -= body.get("presence_penalty", 0)
        if len(new) < least:
            scores[0] = -torch.inf
        new.append(int(scores.argmax()))
        if new[-1] in (0, *body.get("stop_token_ids", ())):
            return tokenizer.decode(new[:-1]), len(new), "stop"
        text = tokenizer.decode(new)
        if found := [text.index(stop) for stop in stops if stop in text]:
            return text[: min(found)], len(new), "stop"
    return tokenizer.decode(new), len(new), "length"


# vLLM's server has its own mind about these.
VLLM_REFUSES = {"two answers", "two answers to two", "two answers in a chat", "no tools"}


def _path(body: dict[str, Any]) -> str:
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


@pytest.mark.parametrize("name", ASKED)
def test_the_same_answers(server: Served, dense: Path, name: str):
    body = {"model": "sparse", "temperature": 0, **ASKED[name]}
    status, text = server.request("POST", _path(body), body)
    if server.engine == "vllm" and name in VLLM_REFUSES:
        assert status == 400
        return
    assert status == 200, text
    answer, right = json.loads(text), expected(dense, name)
    choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
    texts = [c["message"]["content"] if "message" in c else c["text"] for c in choices]
    assert texts == right.texts
    assert [choice["finish_reason"] for choice in choices] == right.reasons
    usage = answer["usage"]
    found = usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]
    assert found == (
        right.prompt_tokens,
        right.new_tokens,
        right.prompt_tokens + right.new_tokens,
    )

    options = {"stream": True, "stream_options": {"include_usage": True}}
    _, text = server.request("POST", _path(body), {**body, **options})
    streamed, reasons = [""] * len(texts), [""] * len(texts)
    *events, last, _ = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    for choice in (choice for event in events for choice in json.loads(event)["choices"]):
        said = choice["delta"].get("content") if "delta" in choice else choice["text"]
        streamed[choice["index"]] += said or ""
        reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
    assert streamed == texts
    assert reasons == right.reasons
    assert json.loads(last)["usage"]["completion_tokens"] == right.new_tokens


@pytest.mark.parametrize("name", REFUSED)
def test_the_same_refusals(server: Served, name: str):
    status, body = REFUSED[name]
    found, text = server.request("POST", _path(body), {"model": "sparse", **body})
    assert found == status, text
    assert json.loads(text)["error"]["message"]


# ------------------------------------------------------------------------- other clients

NODE_SCRIPT = """
const OpenAI = require("openai");
const client = new OpenAI({baseURL: process.argv[1] + "/v1", apiKey: process.argv[2]});
async function main() {
  const asked = {model: "sparse", max_tokens: 9, temperature: 0};
  const messages = [{role: "user", content: "import os"}];
  const whole = await client.chat.completions.create({messages, ...asked});
  const stream = await client.chat.completions.create({messages, stream: true, ...asked});
  let streamed = "";
  for await (const chunk of stream) streamed += chunk.choices[0]?.delta?.content ?? "";
  const text = await client.completions.create({prompt: ["import os\\n"], ...asked});
  const models = (await client.models.list()).data.map((model) => model.id);
  let refused;
  try { await client.completions.create({prompt: "a", suffix: "b", ...asked}); }
  catch (error) { refused = [error.constructor.name, error.param]; }
  const answers = [whole.choices[0].message.content, streamed, text.choices[0].text];
  console.log(JSON.stringify({answers, models, refused}));
}
main();
"""


def _no_node() -> str | None:
    """Why the official client for Node cannot be tried; None if it can."""
    if shutil.which("node") is None:
        return "node is not installed"
    found = subprocess.run(["node", "-e", "require('openai')"], capture_output=True)
    return None if found.returncode == 0 else "npm's package openai is not in NODE_PATH"


def _said(*command: str | Path) -> Any:
    """The JSON that a client prints."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_nodes_client(server: Served, dense: Path):
    if (reason := _no_node()) is not None:
        pytest.skip(reason)
    found = _said("node", "-e", NODE_SCRIPT, server.url, server.key or "none")
    assert found["answers"] == [serving.greedy(dense, "import os\n", 9)] * 3
    assert found["models"] == ["sparse"]
    if server.engine != "vllm":
        assert found["refused"] == ["BadRequestError", "suffix"]


@pytest.mark.skipif(not find_spec("langchain_openai"), reason="langchain-openai is not installed")
def test_langchain(server: Served, dense: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    from langchain_openai import ChatOpenAI, OpenAI

    reached = {"base_url": f"{server.url}/v1", "api_key": server.key or "none", "model": "sparse"}
    asked: dict[str, Any] = {**reached, "temperature": 0, "max_tokens": 9}
    right = serving.greedy(dense, "import os\n", 9)
    chat = ChatOpenAI(**asked)
    answer = chat.invoke([("user", "import os")])
    assert answer.content == right
    assert answer.usage_metadata["output_tokens"] == 9
    assert "".join(str(chunk.content) for chunk in chat.stream([("user", "import os")])) == right
    parts = [{"type": "text", "text": "import os"}]
    assert chat.invoke([{"role": "user", "content": parts}]).content == right
    texts = OpenAI(**asked).generate(["import os\n", "def "])
    assert [each[0].text for each in texts.generations] == [right, serving.greedy(dense, "def ", 9)]


# In an environment of its own: LlamaIndex wants an earlier `openai` than is tested here.
LLAMA_INDEX = Path(sys.prefix, "llama-index/bin/python")

LLAMA_INDEX_SCRIPT = """
import json, sys
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

asked = dict(model="sparse", temperature=0, max_tokens=9, context_window=int(sys.argv[3]))
model = OpenAILike(
    api_base=sys.argv[1] + "/v1", api_key=sys.argv[2], is_chat_model=True, max_retries=0, **asked
)
plain = model.model_copy(update={"is_chat_model": False})
messages = [ChatMessage(role="user", content="import os")]
whole = model.chat(messages)
answers = [
    whole.message.content,
    [chunk.message.content for chunk in model.stream_chat(messages)][-1],
    plain.complete("import os\\n").text,
    [chunk.text for chunk in plain.stream_complete("import os\\n")][-1],
]
refused = None
try:
    plain.complete("a", suffix="b")
except Exception as error:
    refused = [type(error).__name__, error.param]
print(json.dumps({"answers": answers, "tokens": whole.raw.usage.completion_tokens,
                  "refused": refused}))
"""


@pytest.mark.skipif(not LLAMA_INDEX.exists(), reason="LlamaIndex is not installed (make test)")
def test_llama_index(server: Served, dense: Path):
    script = (LLAMA_INDEX, "-c", LLAMA_INDEX_SCRIPT)
    found = _said(*script, server.url, server.key or "none", str(CONTEXT))
    assert found["answers"] == [serving.greedy(dense, "import os\n", 9)] * 4
    assert found["tokens"] == 9
    if server.engine != "vllm":
        assert found["refused"] == ["BadRequestError", "suffix"]
