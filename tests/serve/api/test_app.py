"""The application over an engine that says what it is told to: every answer and every refusal."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from besa.serve.api.middleware import App
from tests.serve.api.parrot import NAME, Parrot, parrot, served

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


class Client:
    """Asks the application, and fails for any answer that is not as the API has it."""

    def __init__(self, engine: Parrot, **around: Any) -> None:
        self.engine = engine
        self.http = TestClient(served(engine, **around), raise_server_exceptions=False)

    def post(self, path: str, **body: Any) -> Any:
        return self.http.post(path, json=body)

    def completion(self, prompt: Any = "abc", **body: Any) -> dict[str, Any]:
        answer = self.post(COMPLETIONS, prompt=prompt, **body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def chat(self, messages: Any = None, **body: Any) -> dict[str, Any]:
        answer = self.post(CHAT, messages=messages or HI, **body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def refusal(self, path: str, **body: Any) -> dict[str, Any]:
        answer = self.post(path, **body)
        assert answer.status_code == 400, answer.text
        error: dict[str, Any] = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        return error

    def events(self, path: str, **body: Any) -> list[Any]:
        text = self.post(path, stream=True, **body).text
        events = [event for event in text.split("\n\n") if event]
        assert all(event.startswith("data: ") for event in events)
        assert events[-1] == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


@pytest.fixture
def client(tiny_model: Path) -> Client:
    return Client(parrot(tiny_model))


# ------------------------------------------------------------------------- completions


def test_a_completion(client: Client):
    answer = client.completion("abc")
    assert answer["object"] == "text_completion"
    assert answer["model"] == NAME
    assert answer["choices"] == [
        {"index": 0, "text": "abc", "logprobs": None, "finish_reason": "stop"}
    ]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def test_prompts_of_every_kind(client: Client):
    """Texts and token numbers, one or several, each with a choice of its own."""
    tokens = client.engine.tokenizer.encode("abc")
    for prompt, texts in (
        ("abc", ["abc"]),
        (["abc"], ["abc"]),
        (["abc", "de"], ["abc", "de"]),
        (tokens, ["abc"]),
        ([tokens, tokens[:1]], ["abc", "a"]),
    ):
        answer = client.completion(prompt)
        assert [choice["text"] for choice in answer["choices"]] == texts
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))
        assert answer["usage"]["prompt_tokens"] == sum(map(len, texts))


def test_several_answers_to_each_prompt(client: Client):
    answer = client.completion(["abc", "de"], n=2, seed=5)
    assert [choice["text"] for choice in answer["choices"]] == ["abc", "abc", "de", "de"]
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 14, "total_tokens": 19}
    assert [request.seed for request in client.engine.asked] == [5, 6, 5, 6]


def test_how_many_tokens_come(client: Client):
    """16 of a completion, all that fit of a chat, and never more than fit."""
    client.engine.says = "x" * 200
    assert client.completion()["usage"]["completion_tokens"] == 16
    assert client.completion()["choices"][0]["finish_reason"] == "length"
    assert client.completion("a" * 120)["usage"]["completion_tokens"] == 8
    assert client.completion(max_tokens=None)["usage"]["completion_tokens"] == 16
    answer = client.chat()
    assert answer["usage"]["total_tokens"] == 128
    assert client.chat(max_tokens=3)["usage"]["completion_tokens"] == 3
    assert client.chat(max_completion_tokens=3, max_tokens=3)["usage"]["completion_tokens"] == 3
    error = client.refusal(CHAT, messages=HI, max_completion_tokens=3, max_tokens=4)
    assert error["param"] == "max_tokens"
    assert client.completion("abc", max_tokens=126)["usage"]["completion_tokens"] == 125
    error = client.refusal(COMPLETIONS, prompt="a" * 128)
    assert error["code"] == "context_length_exceeded"
    assert client.refusal(COMPLETIONS, prompt="")["message"] == "the prompt is empty"


def test_echo_and_stops(client: Client):
    client.engine.says = "one two"
    assert client.completion("abc ", echo=True)["choices"][0]["text"] == "abc one two"
    [choice] = client.completion(stop=["tw", "never"])["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("one ", "stop")
    assert client.completion(stop="n")["choices"][0]["text"] == "o"
    assert client.completion(stop=[])["choices"][0]["text"] == "one two"
    assert client.completion(stop=None)["choices"][0]["text"] == "one two"


def test_least_tokens(client: Client):
    client.completion(ignore_eos=True, max_tokens=8)
    assert client.engine.asked[-1].ignore_eos
    client.completion(min_tokens=2)
    assert client.engine.asked[-1].min_tokens == 2
    assert client.refusal(COMPLETIONS, prompt="a", min_tokens=17)["param"] == "min_tokens"


def test_stop_tokens(client: Client):
    """They end an answer, as the model's own, and have no text."""
    client.engine.says = "one two"
    [end] = client.engine.tokenizer.encode("t")
    answer = client.completion(stop_token_ids=[end])
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("one ", "stop")
    assert answer["usage"]["completion_tokens"] == 5
    assert client.engine.asked[0].stop_token_ids == {end}


def test_logprobs_of_a_completion(client: Client):
    client.engine.says = "one"
    found = client.completion(logprobs=1)["choices"][0]["logprobs"]
    end = client.engine.tokenizer.decode([0])
    assert found["tokens"] == ["o", "n", "e", end]
    assert found["token_logprobs"] == [-0.5] * 4
    assert found["top_logprobs"][0] == {"z": -0.25, "o": -0.5}
    assert found["text_offset"] == [0, 1, 2, 3]
    assert client.completion(logprobs=0)["choices"][0]["logprobs"]["top_logprobs"][0] == {"o": -0.5}
    events = client.events(COMPLETIONS, prompt="abc", logprobs=1)
    parts = [event["choices"][0]["logprobs"] for event in events]
    for name, values in found.items():
        assert [value for part in parts for value in part[name]] == values
    stopped = client.completion(logprobs=1, stop="n")["choices"][0]
    assert (stopped["text"], stopped["logprobs"]["tokens"]) == ("o", ["o", "n"])
    assert client.refusal(COMPLETIONS, prompt="a", logprobs=1, echo=True)["param"] == "logprobs"


def test_logprobs_of_a_chat(client: Client):
    client.engine.says = "Ä"
    asked: dict[str, Any] = {"logprobs": True, "top_logprobs": 1}
    found = client.chat(**asked)["choices"][0]["logprobs"]
    first = found["content"][0]  # half of a character
    assert (first["token"], first["bytes"], first["logprob"]) == ("\ufffd", None, -0.5)
    assert first["top_logprobs"] == [{"token": "z", "logprob": -0.25, "bytes": [122]}]
    assert len(found["content"]) == 3
    events = client.events(CHAT, messages=HI, **asked)
    parts = [event["choices"][0]["logprobs"] or {"content": []} for event in events]
    assert [token for part in parts for token in part["content"]] == found["content"]
    assert client.chat(logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert client.refusal(CHAT, messages=HI, top_logprobs=1)["param"] == "top_logprobs"
    assert client.chat(top_logprobs=0)["choices"][0]["logprobs"] is None


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("asked", "begins"),
    [
        ({"response_format": {"type": "json_object"}}, "{"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "array"}, "strict": True},
                }
            },
            "[",
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "{"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "{"),
        ({"structured_outputs": {"json_object": True}}, "{"),
        ({"structured_outputs": {"regex": "[bc]x"}}, "bc"),
        ({"structured_outputs": {"choice": ["go", "stay"]}}, "gs"),
        ({"structured_outputs": {"grammar": 'start: "q" | "r"'}}, "qr"),
    ],
)
def test_forms_of_an_answer_reach_the_engine(client: Client, asked: dict[str, Any], begins: str):
    """By the letters that a grammar lets an answer begin with."""
    client.completion(**asked)
    client.chat(**asked)
    for request in client.engine.asked:
        assert request.grammar is not None
        mask = request.grammar.start()
        scores = mask(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 257))
        tokens = scores[0].isfinite().nonzero()[:, 0].tolist()
        assert set(client.engine.tokenizer.decode(tokens)) == set(begins)


FORMAT, OUTPUTS = "response_format", "structured_outputs"


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({FORMAT: {"type": "json_schema"}}, FORMAT, "must have a json_schema"),
        ({FORMAT: {"type": "xml"}}, f"{FORMAT}.type", "must be 'text'"),
        ({OUTPUTS: {}}, OUTPUTS, "must have one of json"),
        ({OUTPUTS: {"regex": "a", "choice": ["a"]}}, OUTPUTS, "must have one of json"),
        ({OUTPUTS: {"regex": "(["}}, OUTPUTS, "cannot be kept: "),
        ({OUTPUTS: {"json": "no JSON"}}, OUTPUTS, "cannot be kept: "),
        ({OUTPUTS: {"json": {"not": {}}}}, OUTPUTS, "cannot be kept: Unimplemented keys"),
        ({OUTPUTS: {"whitespace_pattern": "x"}}, f"{OUTPUTS}.whitespace_pattern", "is no field"),
        ({OUTPUTS: {"regex": "a"}, FORMAT: {"type": "json_object"}}, OUTPUTS, "give one"),
        ({OUTPUTS: {"regex": "a"}, "ignore_eos": True}, OUTPUTS, "leave out min_tokens"),
    ],
)
def test_forms_that_cannot_be_kept(client: Client, asked: Any, param: str, words: str):
    for path, prompt in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": HI})):
        error = client.refusal(path, **prompt, **asked)
        assert error["param"] == param
        assert words in error["message"]


def test_forms_of_what_is_parsed(tiny_model: Path):
    """What looks like a call is text; tools and thoughts that have begun leave no room."""
    client = Client(parrot(tiny_model, parses=True))
    client.engine.says = '{"a": "<c>"}'
    asked: dict[str, Any] = {"response_format": {"type": "json_object"}}
    assert client.chat(**asked)["choices"][0]["message"]["content"] == client.engine.says
    assert client.refusal(CHAT, messages=HI, tools=[TOOL], **asked)["param"] == "tools"
    client.engine.tokenizer.chat_template += "<t>"
    error = client.refusal(CHAT, messages=HI, **asked)
    assert "begins the answer with a thought" in error["message"]


def test_sampling_reaches_the_engine(tiny_model: Path):
    """What the request says, else the model's makers, else OpenAI's defaults."""
    client = Client(parrot(tiny_model), defaults={"temperature": 0.6, "top_k": 20})
    client.completion()
    [asked] = client.engine.asked
    assert (asked.temperature, asked.top_p, asked.top_k, asked.min_p) == (0.6, 1.0, 20, 0.0)
    client.completion(
        temperature=0, top_p=0.9, top_k=-1, min_p=0.1, frequency_penalty=1, logit_bias={"5": -100}
    )
    asked = client.engine.asked[-1]
    assert (asked.temperature, asked.top_p, asked.top_k, asked.min_p) == (0, 0.9, 0, 0.1)
    assert (asked.frequency_penalty, asked.logit_bias) == (1, {5: -100.0})
    client = Client(parrot(tiny_model))
    client.completion(top_k=1 << 40)
    assert (client.engine.asked[0].temperature, client.engine.asked[0].top_k) == (1.0, 257)


# ------------------------------------------------------------------------- chats


def test_a_chat(client: Client):
    answer = client.chat()
    assert answer["object"] == "chat.completion"
    [choice] = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "user: Hi\nassistant:",
        "refusal": None,
    }
    assert choice["finish_reason"] == "stop"


def test_parts_of_text_are_lines(client: Client):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    answer = client.chat([{"role": "user", "content": parts}])
    assert answer["choices"][0]["message"]["content"] == "user: one\ntwo\nassistant:"


def test_a_chat_that_is_sent_back(client: Client):
    """With all that an answer has, empty or not."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 2}'}}
    messages = [
        {"role": "user", "content": "Hi", "name": "me"},
        {
            "role": "assistant",
            "content": "Yes",
            "refusal": None,
            "audio": None,
            "function_call": None,
            "annotations": [],
            "tool_calls": [],
        },
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    answer = client.chat(messages)
    said = "user: Hi\nassistant: Yes\nassistant: f(2)\ntool: 3\nassistant:"
    assert answer["choices"][0]["message"]["content"] == said
    without = client.chat([{"role": "assistant", "content": "Yes"}])
    for calls in (None, []):
        message = {"role": "assistant", "content": "Yes", "tool_calls": calls}
        assert client.chat([message])["usage"] == without["usage"]


def test_the_template_is_told(client: Client):
    says = client.chat(chat_template_kwargs={"mood": "sad"})["choices"][0]["message"]["content"]
    assert says.startswith("(sad)user: Hi")
    says = client.chat(add_generation_prompt=False)["choices"][0]["message"]["content"]
    assert says == "user: Hi\n"
    messages = [*HI, {"role": "assistant", "content": "Yes, and"}]
    answer = client.chat(messages, continue_final_message=True)
    assert answer["choices"][0]["message"]["content"] == "user: Hi\nassistant: Yes, and"


@pytest.mark.parametrize(
    "variables", [{"nothing": 1}, {"tokenize": True}, {"chat_template": "x"}, {"conversation": []}]
)
def test_variables_that_the_template_lacks(client: Client, variables: dict[str, Any]):
    error = client.refusal(CHAT, messages=HI, chat_template_kwargs=variables)
    assert error["param"] == "chat_template_kwargs"
    assert next(iter(variables)) in error["message"]


def test_a_template_that_refuses(client: Client):
    client.engine.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    error = client.refusal(CHAT, messages=HI)
    assert error["message"].endswith("refuses the messages: roles must alternate")
    client.engine.tokenizer.chat_template = "{{ 1 / 0 }}"
    assert "refuses the messages" in client.refusal(CHAT, messages=HI)["message"]
    client.engine.tokenizer.chat_template = None
    assert "no chat template" in client.refusal(CHAT, messages=HI)["message"]


# ------------------------------------------------------------------------- calls and thoughts


def test_tools_where_nothing_reads_calls(client: Client):
    assert client.refusal(CHAT, messages=HI, tools=[TOOL])["param"] == "tools"
    assert client.chat(tools=[])["choices"][0]["finish_reason"] == "stop"
    assert client.chat(tools=[TOOL], tool_choice="none")["choices"]


def test_tools_that_the_template_has_no_place_for(tiny_model: Path):
    client = Client(parrot(tiny_model, parses=True))
    client.engine.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    error = client.refusal(CHAT, messages=HI, tools=[TOOL])
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
    assert "no place" in error["message"]


def test_earlier_calls_that_the_template_has_no_place_for(client: Client):
    client.engine.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [*HI, {"role": "assistant", "content": "Yes", "tool_calls": [call]}]
    error = client.refusal(CHAT, messages=messages)
    assert error["message"].startswith("tool_calls are not supported by this server")
    messages[1]["tool_calls"] = [{**call, "function": {"name": "f", "arguments": "no JSON"}}]
    assert "must be JSON" in client.refusal(CHAT, messages=messages)["message"]


def test_calls_and_thoughts(tiny_model: Path):
    client = Client(parrot(tiny_model, parses=True))
    client.engine.says = '<t>Hm</t>Well<c>{"name": "f", "arguments": {"a": 1}}</c>'
    asked: dict[str, Any] = {"tools": [TOOL], "max_tokens": 64}
    [choice] = client.chat(**asked)["choices"]
    message = choice["message"]
    assert (message["content"], message["reasoning_content"]) == ("Well", "Hm")
    [call] = message["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] == "f"
    assert json.loads(call["function"]["arguments"]) == {"a": 1}
    assert choice["finish_reason"] == "tool_calls"

    events = client.events(CHAT, messages=HI, **asked)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "Hm"
    assert "".join(delta.get("content") or "" for delta in deltas) == "Well"
    [streamed] = [call for delta in deltas for call in delta.get("tool_calls") or []]
    assert (streamed["index"], streamed["function"]) == (0, call["function"])
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("says", ['x<c>{"name": ', "x<c>no call</c>y", '<c>{"a": 1}</c>'])
def test_what_is_no_call_is_an_answer(tiny_model: Path, says: str):
    client = Client(parrot(tiny_model, parses=True))
    client.engine.says = says
    [choice] = client.chat(tools=[TOOL])["choices"]
    assert choice["finish_reason"] == "stop"
    assert not choice["message"].get("tool_calls")


# ------------------------------------------------------------------------- streams


def test_a_stream(client: Client):
    client.engine.says = "one"
    events = client.events(COMPLETIONS, prompt="abc", echo=True)
    assert "".join(event["choices"][0]["text"] for event in events) == "abcone"
    assert [event["choices"][0]["finish_reason"] for event in events][-1] == "stop"
    assert not any("usage" in event for event in events)
    assert len({event["id"] for event in events}) == 1


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_usage_in_a_stream(client: Client, path: str):
    client.engine.says = "one"
    asked: dict[str, Any] = {"prompt": "abc"} if path == COMPLETIONS else {"messages": HI}
    options = {"include_usage": True}
    *events, last = client.events(path, stream_options=options, **asked)
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    options["continuous_usage_stats"] = True
    *events, _ = client.events(path, stream_options=options, **asked)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 4


def test_several_answers_in_a_stream(client: Client):
    events = client.events(COMPLETIONS, prompt=["ab", "cd"], n=2)
    texts = ["", "", "", ""]
    ends = []
    for event in events:
        [choice] = event["choices"]
        texts[choice["index"]] += choice["text"]
        ends += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert texts == ["ab", "ab", "cd", "cd"]
    assert ends == ["stop"] * 4


def test_an_engine_that_fails(client: Client):
    client.engine.error = "out of memory"
    answer = client.post(COMPLETIONS, prompt="abc")
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the engine failed: out of memory"
    assert client.post(COMPLETIONS, prompt=["abc", "de"]).status_code == 500
    events = client.events(COMPLETIONS, prompt="abc")
    assert events[-1]["error"]["type"] == "server_error"
    client.engine.failed = "it is gone"
    answer = client.post(COMPLETIONS, prompt="abc")
    assert answer.status_code == 503
    assert client.http.get("/health").status_code == 503


# ------------------------------------------------------------------------- what is refused


def test_another_model(client: Client):
    for model in ("another", ""):
        answer = client.post(COMPLETIONS, prompt="a", model=model)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
    for same in (NAME, None):
        assert client.completion(model=same)


def test_what_asks_for_nothing(client: Client):
    assert client.completion(frequency_penalty=0, presence_penalty=0.0, logit_bias={}, min_p=0)
    assert client.completion(seed=1, min_p=0.5, temperature=0, stop_token_ids=[])
    assert client.completion(response_format={"type": "text"})
    [asked] = {request.grammar for request in client.engine.asked}
    assert asked is None


def test_tokens_that_there_are_not(client: Client):
    for name, value in (("logit_bias", {"257": 1}), ("stop_token_ids", [257])):
        assert client.refusal(COMPLETIONS, prompt="a", **{name: value})["param"] == name
    for prompt in ([257], [-1], [[5], [1 << 70]]):
        assert client.refusal(COMPLETIONS, prompt=prompt)["param"] == "prompt"


@pytest.mark.parametrize(
    ("status", "method", "path", "headers", "body"),
    [
        (404, "GET", "/v1/nothing", {}, None),
        (404, "GET", "/v1/models/another", {}, None),
        (405, "GET", COMPLETIONS, {}, None),
        (405, "DELETE", "/v1/models", {}, None),
        (415, "POST", COMPLETIONS, {}, b'{"prompt": "a"}'),
        (415, "POST", COMPLETIONS, {"content-type": "text/plain"}, b'{"prompt": "a"}'),
        (400, "POST", COMPLETIONS, {"content-type": "application/json"}, b""),
        (400, "POST", COMPLETIONS, {"content-type": "application/json"}, b"{"),
        (400, "POST", COMPLETIONS, {"content-type": "application/json"}, b"\xff\xfe"),
        (400, "POST", COMPLETIONS, {"content-type": "application/json"}, b"[1]"),
        (400, "POST", COMPLETIONS, {"content-type": "application/json"}, b"null"),
        (400, "POST", COMPLETIONS, {"content-type": "application/json"}, b"[" * 100_000),
        (400, "POST", CHAT, {"content-type": "application/json"}, b'{"messages": [' * 50_000),
        (413, "POST", CHAT, {"content-type": "application/json"}, b" " * (33 << 20)),
    ],
)
@pytest.mark.parametrize("origin", [{}, {"origin": "http://localhost:3000"}])
def test_errors_of_http(
    tiny_model: Path,
    status: int,
    method: str,
    path: str,
    headers: dict[str, str],
    body: bytes | None,
    origin: dict[str, str],
):
    client = Client(parrot(tiny_model), cors=True)
    answer = client.http.request(method, path, headers={**headers, **origin}, content=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    assert ("access-control-allow-origin" in answer.headers) == bool(origin)


# ------------------------------------------------------------------------- around the endpoints


def test_models_and_health(client: Client):
    [model] = client.http.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == (NAME, "model", 128)
    assert client.http.get(f"/v1/models/{NAME}").json() == model
    assert client.http.get("/v1/models/").json() == client.http.get("/v1/models").json()
    assert client.http.get("/health").json() == {"status": "ok"}
    assert client.http.head("/health").status_code == 200


def test_a_key(tiny_model: Path):
    client = Client(parrot(tiny_model), key="secret", cors=True)
    assert client.http.get("/health").status_code == 200
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            answer = client.http.get(path, headers={**headers, "origin": "http://x"})
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["access-control-allow-origin"] == "*"
    shown = {"authorization": "Bearer secret"}
    assert client.http.get("/v1/models", headers=shown).status_code == 200
    asks = {"origin": "http://x", "access-control-request-method": "POST"}
    assert client.http.options(CHAT, headers=asks).status_code == 200


def test_no_cors_unless_asked_for(client: Client):
    answer = client.http.get("/v1/models", headers={"origin": "http://x"})
    assert "access-control-allow-origin" not in answer.headers


def test_request_ids(client: Client):
    given = client.http.get("/v1/models", headers={"x-request-id": "mine"})
    assert given.headers["x-request-id"] == "mine"
    for bad in ("a b", "x" * 129, ""):
        answer = client.http.get("/v1/models", headers={"x-request-id": bad})
        assert len(answer.headers["x-request-id"]) == 32


def test_metrics(client: Client):
    client.completion("abc")
    client.refusal(COMPLETIONS, prompt="")
    client.http.get("/v1/made-up")
    text = client.http.get("/metrics").text
    for line in (
        f'besa_prompt_tokens_total{{model_name="{NAME}"}} 3.0',
        f'besa_generation_tokens_total{{model_name="{NAME}"}} 4.0',
        f'besa_answers_running{{model_name="{NAME}"}} 0.0',
        f'besa_answers_waiting{{model_name="{NAME}"}} 0.0',
        f'besa_time_to_first_token_seconds_count{{model_name="{NAME}"}} 1.0',
        f'besa_time_between_tokens_seconds_count{{model_name="{NAME}"}} 3.0',
        f'besa_requests_total{{model_name="{NAME}",path="{COMPLETIONS}",status="200"}} 1.0',
        f'besa_requests_total{{model_name="{NAME}",path="{COMPLETIONS}",status="400"}} 1.0',
        f'besa_requests_total{{model_name="{NAME}",path="other",status="404"}} 1.0',
    ):
        assert line in text.splitlines(), text


def test_the_log_has_no_prompts(client: Client, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "besa.serve.access"):
        client.completion("a secret")
        client.http.get("/v1/%0Aforged")
    assert "POST /v1/completions 200" in caplog.text
    assert "secret" not in caplog.text
    assert "forged" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
def test_a_client_that_hangs_up_stops_its_answers(tiny_model: Path, stream: bool, prompt: Any):
    engine = parrot(tiny_model)
    engine.endless = True
    body = json.dumps({"prompt": prompt, "stream": stream, "max_tokens": 100}).encode()

    async def run() -> None:
        app: App = served(engine)
        hang_up, messages = asyncio.Event(), [{"type": "http.request", "body": body}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await hang_up.wait()
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            """Nobody reads it."""

        scope = {
            "type": "http",
            "method": "POST",
            "path": COMPLETIONS,
            "raw_path": COMPLETIONS.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        work = asyncio.ensure_future(app(scope, receive, send))
        while len(engine.streams) < (1 if isinstance(prompt, str) else 2):
            await asyncio.sleep(0.001)
        hang_up.set()
        await work
        assert all(stream.is_cancelled for stream in engine.streams)

    asyncio.run(asyncio.wait_for(run(), 60))
