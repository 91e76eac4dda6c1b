"""The application against its own OpenAPI schema: whatever a request has, no answer is a 5xx.

`BESA_SCHEMA_EXAMPLES=2000 pytest tests/serve/api/test_schema.py` asks as many of each endpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from transformers import AutoModelForCausalLM

from besa.export import ExportConfig, export
from besa.serve.api.middleware import App
from besa.serve.transformers.backend import TransformersBackend, batches_for
from tests.serve.api.parrot import NAME, over, parrot, served

pytest.importorskip("schemathesis")

from schemathesis import GenerationMode
from schemathesis.openapi import from_asgi

EXAMPLES = int(os.environ.get("BESA_SCHEMA_EXAMPLES", "25"))
REAL = [pytest.param(name, marks=pytest.mark.slow) for name in ("batches", "one by one", "onnx")]
POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
ASKED = [
    ("GET", "/v1/models", POSITIVE),
    ("GET", "/v1/models/{name}", POSITIVE),
    *(("POST", "/v1/completions", mode) for mode in (POSITIVE, NEGATIVE)),
    *(("POST", "/v1/chat/completions", mode) for mode in (POSITIVE, NEGATIVE)),
]


@pytest.fixture(scope="module", params=["parrot", *REAL])
def app(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[App]:
    """The application over an engine: one that computes nothing, and the real ones."""
    name: str = request.param
    if name == "parrot":
        yield served(parrot(tiny_model, parses=True))
        return
    tokenizer = parrot(tiny_model).tokenizer
    if name == "onnx":
        pytest.importorskip("onnxruntime_genai")
        directory = tiny_model.with_name("tiny-onnx")
        export(tiny_model, ExportConfig(out=directory, format="onnx"))
        from besa.serve.onnx.generation import OnnxBackend

        backend = OnnxBackend(directory, threads=1)
        yield over(backend, tokenizer, {})
        backend.stop()
    else:
        model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
        batches = None if name == "one by one" else batches_for(model, None)
        yield over(TransformersBackend(model, batches), tokenizer, {})


@pytest.mark.parametrize(("method", "path", "mode"), ASKED)
def test_no_answer_is_a_fault(app: App, method: str, path: str, mode: GenerationMode):
    """Of requests that fit the schema, and of such that do not."""
    operation = from_asgi("/openapi.json", app=app)[path][method]

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = NAME  # another is a 404, and that is all
        answer = case.call()
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"}

    ask()
