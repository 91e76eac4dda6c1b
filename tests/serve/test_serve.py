"""`besa serve` with the real engines, asked by the official client: one server for each way.

What it says is what the dense masked model says in transformers, whatever was asked before.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.serve import serving
from tests.serve.conformance import (  # noqa: F401 - collected here
    test_langchain,
    test_llama_index,
    test_nodes_client,
    test_the_same_answers,
    test_the_same_refusals,
)
from tests.serve.serving import NEW_TOKENS, PROMPTS, Served, greedy

pytestmark = pytest.mark.slow

KEY = "a key of the environment's"
POSITIONS = 256


# transformers' engine batches requests on a CPU, and answers one after the other elsewhere.
WAYS = [*serving.ENGINES, "transformers --no-continuous-batching"]


@pytest.fixture(scope="module", params=WAYS)
def server(
    request: pytest.FixtureRequest, sparse: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    engine, *own = request.param.split()
    own += ["--enforce-eager", "--max-num-seqs", 16] if engine == "vllm" else ["--default-seed", 1]
    served = serving.start(
        engine,
        sparse,
        tmp_path_factory.mktemp(engine),
        *("--dtype", "float32", *own),
        BESA_API_KEY=KEY,
    )
    served.key = KEY
    try:
        yield serving.ready(served)
    finally:
        serving.finish(served)


def check(served: Served, dense: Path) -> None:
    """What the server says is what the dense model says."""
    assert {prompt: served.says(prompt) for prompt in PROMPTS} == {
        prompt: greedy(dense, prompt) for prompt in PROMPTS
    }


# ------------------------------------------------------------------------- what it says


def test_completions(server: Served, dense: Path):
    check(server, dense)


def test_another_mask_is_caught(server: Served, other: Path):
    with pytest.raises(AssertionError):
        check(server, other)
    assert all(server.says(prompt) != greedy(other, prompt) for prompt in PROMPTS)


def test_what_else_is_in_an_answer(server: Served):
    answer = server.client().completions.create(
        model="sparse", prompt=PROMPTS[0], max_tokens=NEW_TOKENS, temperature=0
    )
    assert answer.model == "sparse"
    assert answer.object == "text_completion"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == NEW_TOKENS
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + NEW_TOKENS


def test_chat(server: Served, dense: Path):
    answer = server.client().chat.completions.create(
        model="sparse",
        messages=[
            {"role": "system", "content": "Modules:"},
            {"role": "user", "content": "import os"},
        ],
        max_tokens=NEW_TOKENS,
        temperature=0,
    )
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == greedy(dense, "Modules:\nimport os\n")
    assert choice.finish_reason == "length"
    shorter = server.client().chat.completions.create(
        model="sparse",
        messages=[{"role": "user", "content": "import os"}],
        max_completion_tokens=3,
        temperature=0,
    )
    assert shorter.choices[0].message.content == greedy(dense, "import os\n", 3)


def test_streamed(server: Served, dense: Path):
    prompt = PROMPTS[1]
    stream = server.client().completions.create(
        model="sparse", prompt=prompt, max_tokens=NEW_TOKENS, temperature=0, stream=True
    )
    chunks = [choice for chunk in stream for choice in chunk.choices]
    assert "".join(choice.text for choice in chunks) == greedy(dense, prompt)
    assert len([choice for choice in chunks if choice.text]) > NEW_TOKENS / 3
    assert chunks[-1].finish_reason == "length"
    assert {choice.finish_reason for choice in chunks[:-1]} == {None}


def test_streamed_chat(server: Served, dense: Path):
    stream = server.client().chat.completions.create(
        model="sparse",
        messages=[{"role": "user", "content": "import os"}],
        max_tokens=NEW_TOKENS,
        temperature=0,
        stream=True,
    )
    chunks = [choice for chunk in stream for choice in chunk.choices]
    assert chunks[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for choice in chunks)
    assert text == greedy(dense, "import os\n")
    assert chunks[-1].finish_reason == "length"


def test_streams_end_as_the_protocol_says(server: Served):
    body = {"model": "sparse", "prompt": "a", "max_tokens": 2, "stream": True}
    status, text = server.request("POST", "/v1/completions", body)
    assert status == 200
    events = [event for event in text.split("\n\n") if event]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-1])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_stop_strings(server: Served, dense: Path, chat: bool, stream: bool):
    prompt = "import os\n"
    whole = greedy(dense, prompt)
    stop = whole[7:10]
    client: Any = server.client()
    asked = {"model": "sparse", "max_tokens": NEW_TOKENS, "temperature": 0, "stream": stream}
    asked["stop"] = ["never in there", stop]
    if chat:
        message = {"role": "user", "content": prompt.strip()}
        answer = client.chat.completions.create(messages=[message], **asked)
    else:
        answer = client.completions.create(prompt=prompt, **asked)
    choices = [choice for part in (answer if stream else [answer]) for choice in part.choices]
    if chat:
        texts = [(choice.delta if stream else choice.message).content or "" for choice in choices]
    else:
        texts = [choice.text for choice in choices]
    assert "".join(texts) == whole[: whole.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_by_chance(server: Served):
    def says(**sampling: Any) -> str:
        answer = server.client().completions.create(
            model="sparse", prompt=PROMPTS[0], max_tokens=NEW_TOKENS, **sampling
        )
        return str(answer.choices[0].text)

    first = says(temperature=1.0, seed=1)
    assert says(temperature=1.0, seed=1) == first
    assert says(temperature=1.0, seed=2) != first
    assert says(temperature=1.0, seed=1, top_p=1e-6) == says(temperature=0)


def test_the_end_of_a_text(server: Served):
    """A bias makes the model end at once, unless that is to be ignored."""
    client: Any = server.client()
    asked = {"model": "sparse", "max_tokens": 5, "temperature": 0, "logit_bias": {"0": 100}}
    for more, reason, tokens in (({}, "stop", 1), ({"ignore_eos": True}, "length", 5)):
        answer = client.completions.create(prompt="def ", **asked, extra_body=more)
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == (reason, tokens)
        message = {"role": "user", "content": "def "}
        answer = client.chat.completions.create(messages=[message], **asked, extra_body=more)
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == (reason, tokens)


def test_logprobs(server: Served, dense: Path):
    asked = {"model": "sparse", "max_tokens": NEW_TOKENS, "temperature": 0}
    client: Any = server.client()
    for prompt in PROMPTS:
        answer = client.completions.create(prompt=prompt, logprobs=1, **asked).choices[0]
        expected = serving.logprobs(dense, prompt)
        assert answer.logprobs.token_logprobs == pytest.approx(expected, abs=2e-4)
        assert "".join(answer.logprobs.tokens) == answer.text
        assert answer.logprobs.text_offset[-1] + len(answer.logprobs.tokens[-1]) == len(answer.text)
    message = {"role": "user", "content": PROMPTS[1].strip()}
    chat = client.chat.completions.create(
        messages=[message], logprobs=True, top_logprobs=3, **asked
    )
    told = chat.choices[0].logprobs.content
    expected = serving.logprobs(dense, PROMPTS[1])
    assert [each.logprob for each in told] == pytest.approx(expected, abs=2e-4)
    assert all(bytes(each.bytes).decode() == each.token for each in told)
    assert all(each.top_logprobs[0].token == each.token for each in told)
    assert {len(each.top_logprobs) for each in told} == {3}


def test_json(server: Served):
    """Of a schema, whole and streamed, by the likeliest tokens and by chance."""
    if server.engine == "vllm":
        pytest.skip("vLLM lets this model put blank after blank")
    choices = {"choice": ["import re", "from os"]}
    assert server.says(PROMPTS[1], extra_body={"structured_outputs": choices}) in choices["choice"]
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["dog", "cat"]}, "tame": {"type": "boolean"}},
        "required": ["kind", "tame"],
        "additionalProperties": False,
    }
    client: Any = server.client()
    for temperature, stream in ((0, False), (0, True), (1, False)):
        answer = client.chat.completions.create(
            model="sparse",
            messages=[{"role": "user", "content": "import json"}],
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "pet", "schema": schema},
            },
            max_tokens=64,
            temperature=temperature,
            stream=stream,
        )
        parts = [part.choices[0] for part in (answer if stream else [answer])]
        said = [(part.delta if stream else part.message).content or "" for part in parts]
        pet = json.loads("".join(said))
        assert pet.keys() == {"kind", "tame"}
        assert pet["kind"] in ("dog", "cat")
        assert parts[-1].finish_reason == "stop"


# ------------------------------------------------------------------------- what there is


def test_what_it_prints(server: Served):
    assert server.output.splitlines()[0] == f"{server.url}/v1 serves sparse"
    lines = server.errors.splitlines()
    assert lines[0].startswith(f"besa serve: {server.engine} ")
    assert lines[0].endswith(" loads sparse (--verbose shows its log)")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_line(server: Served):
    line = server.output.splitlines()[1]
    result = subprocess.run(
        ["sh", "-c", f"{line} -s"], env={"BESA_API_KEY": KEY}, capture_output=True, text=True
    )
    assert json.loads(result.stdout)["choices"][0]["text"], result.stdout


def test_models_health_and_metrics(server: Served):
    [model] = server.client().models.list().data
    assert model.id == "sparse"
    assert server.request("GET", "/health")[0] == 200
    status, text = server.request("GET", "/metrics")
    assert status == 200
    name = "vllm:num_requests_running" if server.engine == "vllm" else "besa_answers_running"
    assert name in text


def test_flags_of_the_engine_reach_it(server: Served):
    """This context, which besa asks for, and --max-num-seqs, which it does not know."""
    commands = [" ".join(process.cmdline()) for process in server.processes()]
    assert any("--default-seed 1" in c or "--max-num-seqs 16" in c for c in commands)
    if server.engine == "vllm":
        [model] = json.loads(server.request("GET", "/v1/models")[1])["data"]
        assert model["max_model_len"] == POSITIONS


def test_this_machine_only(server: Served):
    port = int(server.url.rpartition(":")[2])
    listening = [
        connection.laddr
        for process in server.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert port in [address.port for address in listening]
    assert {address.ip for address in listening} <= {"127.0.0.1", "::1"}


def test_nothing_reports_home(server: Served):
    environments = [process.environ() for process in server.processes()]
    # A process that has given itself another name has written over its environment.
    known = [environment for environment in environments if "BESA_SHUTDOWN_TIMEOUT" in environment]
    assert known
    for environment in known:
        for name in ("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY"):
            assert environment[name] == "1"


def test_the_key_is_on_no_command_line(server: Served):
    assert not [p for p in server.processes() if KEY in " ".join(p.cmdline())]
    assert KEY not in server.errors + server.output


# ------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/models"])
@pytest.mark.parametrize("key", ["wrong", KEY[:-1], KEY + "x"])
def test_wrong_keys(server: Served, path: str, key: str):
    method = "GET" if path.endswith("models") else "POST"
    status, text = server.request(method, path, {"model": "sparse", "prompt": "a"}, key)
    assert status == 401
    assert KEY not in text


def test_no_key(server: Served):
    with pytest.raises(openai.AuthenticationError):
        server.client("none").models.list()


BAD_BODIES = {
    "no JSON": b'{"model": "sparse", "prompt": ',
    "no text": b"\xff\xfe\x00",
    "nothing": b"",
    "no object": b"[1, 2]",
    "no prompt": b'{"model": "sparse"}',
    "a prompt of another type": b'{"model": "sparse", "prompt": {"a": 1}}',
    "tokens below zero": b'{"model": "sparse", "prompt": "a", "max_tokens": -1}',
    "a stop string of another type": b'{"model": "sparse", "prompt": "a", "stop": [1]}',
    "a temperature that is none": b'{"model": "sparse", "prompt": "a", "temperature": "hot"}',
    "a probability of nothing": b'{"model": "sparse", "prompt": "a", "top_p": 0}',
    "a bias for no token": b'{"model": "sparse", "prompt": "a", "logit_bias": {"99999": 1}}',
    "a bias for a word": b'{"model": "sparse", "prompt": "a", "logit_bias": {"word": 1}}',
    "a prompt that is too long": json.dumps(
        {"model": "sparse", "prompt": "word " * 4 * POSITIONS, "max_tokens": 4}
    ).encode(),
    "a prompt that is far too long": json.dumps(
        {"model": "sparse", "prompt": "word " * 200_000, "max_tokens": 4}
    ).encode(),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_requests(server: Served, dense: Path, name: str):
    status, text = server.request("POST", "/v1/completions", BAD_BODIES[name])
    assert status in (400, 413, 422), text
    if not (server.engine == "vllm" and name == "no text"):  # vLLM has no words of its own for it
        assert json.loads(text)["error"]["message"]
    assert server.says(PROMPTS[0]) == greedy(dense, PROMPTS[0])


def test_bad_chats(server: Served, dense: Path):
    for messages in ("hello", [{"content": "no role"}], [1], None):
        body = {"model": "sparse", "messages": messages, "max_tokens": 2}
        status, text = server.request("POST", "/v1/chat/completions", body)
        assert status in (400, 422), (messages, text)
    assert server.says(PROMPTS[0]) == greedy(dense, PROMPTS[0])


def test_no_such_thing(server: Served):
    with pytest.raises(openai.NotFoundError):
        server.client().completions.create(model="another", prompt="a")
    assert server.request("GET", "/v1/nothing")[0] == 404
    assert server.request("POST", "/load_model", {"model": "another"})[0] == 404


# ------------------------------------------------------------------------- many at a time


async def _many(served: Served, dense: Path) -> None:
    """64 requests at once, streamed or not; every other one is given up midway."""
    client = served.async_client()

    async def ask(number: int) -> str | None:
        prompt, stream, given_up = PROMPTS[number % 5], number % 4 < 2, number % 2 == 1
        asked: dict[str, Any] = {"model": "sparse", "prompt": prompt, "temperature": 0}
        asked["max_tokens"] = 200 if given_up else NEW_TOKENS
        if not stream:
            call = client.completions.create(**asked)
            if not given_up:
                return str((await call).choices[0].text)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(call, 0.05)
            return None
        text, parts = "", 0
        chunks = await client.completions.create(**asked, stream=True)
        async for chunk in chunks:
            text += "".join(choice.text for choice in chunk.choices)
            parts += 1
            if given_up and parts == 3:
                await chunks.close()
                return None
        return text

    answers = await asyncio.gather(*(ask(number) for number in range(64)))
    await client.close()
    for number, answer in enumerate(answers):
        if number % 2 == 0:
            assert answer == greedy(dense, PROMPTS[number % 5])


def test_many_of_whom_half_give_up(server: Served, dense: Path):
    asyncio.run(_many(server, dense))
    assert server.request("GET", "/health")[0] == 200
    check(server, dense)


def test_who_gives_up_costs_nothing_more(server: Served):
    serving.rests(server, seed=1)


# ------------------------------------------------------------------------- the last of it


def test_sigterm_lets_it_finish(server: Served, dense: Path):
    """What has begun is answered whole, what is new is not taken, and nothing is left."""
    serving.finishes(server, dense)
    with pytest.raises(openai.APIConnectionError):
        server.client().models.list()
    lines = server.errors.splitlines()
    assert lines[1:] == ["besa serve: finishes what it has begun (Ctrl-C stops it at once)"]
