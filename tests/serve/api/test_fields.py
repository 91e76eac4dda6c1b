"""The table of fields: it is whole, the documentation prints it, and requests go by it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from besa.serve.api.errors import ApiError
from besa.serve.api.fields import supports, table
from besa.serve.api.requests import REQUESTS, ChatRequest, CompletionRequest, parsed
from tests.helpers import REPOSITORY

HI = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {"completions": {"prompt": "a"}, "chat": {"messages": HI}}


def test_the_documentation_prints_it():
    """`table(REQUESTS)` makes it."""
    page = (REPOSITORY / "docs/serve.md").read_text()
    _, _, rest = page.partition("<!-- fields -->\n")
    assert rest.partition("\n<!-- end of fields -->")[0] == table(REQUESTS)


@pytest.mark.parametrize(
    ("request_type", "theirs"),
    [
        (CompletionRequest, completion_create_params.CompletionCreateParamsBase),
        (ChatRequest, chat_create_params.CompletionCreateParamsBase),
    ],
)
def test_every_field_of_openai_is_known(request_type: Any, theirs: Any):
    assert set(theirs.__annotations__) <= set(supports(request_type))


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed")
def test_every_field_of_vllm_is_known():
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest as Theirs

    assert set(Theirs.model_fields) <= set(supports(CompletionRequest))
    assert set(ChatCompletionRequest.model_fields) <= set(supports(ChatRequest))


FIELDS = [(kind, name) for kind, request in REQUESTS.items() for name in supports(request)]


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_null_asks_for_nothing(kind: str, name: str):
    if name not in BODIES[kind]:
        parsed(REQUESTS[kind], {**BODIES[kind], name: None})


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_as_the_table_says(kind: str, name: str):
    """What is refused is refused by name, and what is harmless is not."""
    support = supports(REQUESTS[kind])[name]
    for value in support.harmless or ():
        parsed(REQUESTS[kind], {**BODIES[kind], name: value})
    if support.kind != "refused":
        return
    for value in ("anything", 7, True, [1], {"a": 1}, -0.5):
        if (type(value), value) in [(type(one), one) for one in support.harmless]:
            continue
        with pytest.raises(ApiError, match="is not supported by this server") as caught:
            parsed(REQUESTS[kind], {**BODIES[kind], name: value})
        assert caught.value.param == name
        assert caught.value.code == "unsupported_parameter"
        assert caught.value.status == 400


@pytest.mark.parametrize("kind", BODIES)
def test_unknown_fields_are_refused_by_name(kind: str):
    for name in ("temprature", "body", "__proto__", "ä"):
        with pytest.raises(ApiError, match="is no field that this server knows") as caught:
            parsed(REQUESTS[kind], {**BODIES[kind], name: 1})
        assert caught.value.code == "unknown_parameter"


WORDINGS = [
    ("completions", {"prompt": None}, "prompt must be a string, a list of strings, token numbers"),
    ("completions", {"prompt": []}, "prompt must be"),
    ("completions", {"prompt": ["a", 5]}, "prompt must be"),
    ("completions", {"prompt": [True]}, "prompt must be"),
    ("completions", {"prompt": [[]]}, "prompt must be"),
    ("completions", {"prompt": "a\ud83d"}, "the body has text with half of a surrogate pair"),
    ("completions", {"max_tokens": "many"}, "max_tokens must be a whole number"),
    ("completions", {"max_tokens": 1.5}, "max_tokens must be a whole number"),
    ("completions", {"max_tokens": True}, "max_tokens must be a whole number"),
    ("completions", {"max_tokens": 0}, "max_tokens must be 1 or more"),
    ("completions", {"n": 0}, "n must be 1 or more"),
    ("completions", {"n": 129}, "n must be 128 or less"),
    ("completions", {"temperature": "hot"}, "temperature must be a number"),
    ("completions", {"temperature": float("nan")}, "temperature must be a number"),
    ("completions", {"top_p": 0}, "top_p must be more than 0"),
    ("completions", {"top_p": float("nan")}, "top_p must be"),
    ("completions", {"stream": "yes"}, "stream must be true or false"),
    ("completions", {"stream_options": "x"}, "stream_options must be an object"),
    ("completions", {"stream_options": {"x": 1}}, "stream_options.x is no field"),
    ("completions", {"stop": [1]}, "stop must be a string or a list of strings"),
    ("completions", {"stop": [""]}, "stop must be a string or a list of strings"),
    ("completions", {"stop": list("abcde")}, "stop must have 4 strings at most"),
    ("completions", {"logit_bias": {"word": 1}}, "logit_bias must be an object of token numbers"),
    ("completions", {"logit_bias": {"5": "x"}}, "logit_bias must have numbers as biases"),
    ("completions", {"logit_bias": {"5": 101}}, "logit_bias must have biases from -100 to 100"),
    ("completions", {"frequency_penalty": 3}, "frequency_penalty must be 2 or less"),
    ("completions", {"seed": 1 << 70}, "seed must be"),
    ("completions", {"model": 5}, "model must be a string"),
    ("chat", {"messages": None}, "messages must be a list of objects with a role and a content"),
    ("chat", {"messages": []}, "messages must be a list"),
    ("chat", {"messages": "hi"}, "messages must be a list"),
    ("chat", {"messages": ["hi"]}, "messages must be a list"),
    ("chat", {"messages": [{"content": "hi"}]}, r"messages\[0\].role is missing"),
    ("chat", {"messages": [{"role": 1, "content": ""}]}, r"messages\[0\].role must be a string"),
    ("chat", {"messages": [{"role": "user"}]}, r"messages\[0\] must have a content"),
    ("chat", {"messages": [{"role": "user", "content": 5}]}, r"messages\[0\].content must be"),
    (
        "chat",
        {"messages": [{"role": "user", "content": [5]}]},
        r"messages\[0\].content must be a list of parts",
    ),
    (
        "chat",
        {"messages": [*HI, {"role": "user", "content": "", "x": 1}]},
        r"messages\[1\].x is no",
    ),
    ("chat", {"tools": [{"type": "function"}]}, r"tools\[0\].function is missing"),
    ("chat", {"tool_choice": "required"}, "tool_choice must be"),
    ("chat", {"chat_template_kwargs": []}, "chat_template_kwargs must be an object"),
]


@pytest.mark.parametrize(("kind", "wrong", "words"), WORDINGS)
def test_what_is_wrong_is_said_in_plain_words(kind: str, wrong: dict[str, Any], words: str):
    with pytest.raises(ApiError, match=f"^{words}") as caught:
        parsed(REQUESTS[kind], {**BODIES[kind], **wrong})
    assert caught.value.status == 400
    assert caught.value.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "file", "file": {"file_id": "1"}},
    ],
)
def test_parts_that_are_no_text_are_refused_by_name(part: dict[str, Any]):
    kind, content = part["type"], [{"type": "text", "text": "see"}, part]
    with pytest.raises(ApiError, match=rf'"{kind}" is not supported') as caught:
        parsed(ChatRequest, {"messages": [{"role": "user", "content": content}]})
    assert caught.value.param == "messages[0].content"
