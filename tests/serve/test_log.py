"""`reason_of`: the line of an engine's log that says why it ended, in logs of the real ones."""

from __future__ import annotations

import pytest

from besa.serve.log import reason_of

# What the engines wrote, shortened in the middle.
LOGS = {
    "a flag that vLLM lacks": (
        """usage: vllm serve [model_tag] [options]
vllm: error: unrecognized arguments: --no-such-flag""",
        "unrecognized arguments: --no-such-flag",
    ),
    "a flag that transformers lacks": (
        "error: No such option: --no-such-flag",
        "No such option: --no-such-flag",
    ),
    "a value that vLLM's settings refuse": (
        """(APIServer pid=71) Traceback (most recent call last):
(APIServer pid=71)   File "/x/vllm/engine/arg_utils.py", line 1, in create_model_config
(APIServer pid=71) pydantic_core.ValidationError: 1 validation error for ModelConfig
(APIServer pid=71)   Value error, max_model_len (4096) is too large [type=value_error, …]
(APIServer pid=71)     For further information visit https://errors.pydantic.dev/2/v/value_error""",
        "max_model_len (4096) is too large",
    ),
    "a process of vLLM's that failed, and the one that noticed": (
        """(EngineCore pid=9) ERROR 11-25 09:00:00 [core.py:1500] EngineCore failed to start.
(EngineCore pid=9) ERROR 11-25 09:00:00 [core.py:1500] Traceback (most recent call last):
(EngineCore pid=9) ERROR 11-25 09:00:00 [core.py:1500]   File "/x/packed.py", line 7, in check
(EngineCore pid=9) ERROR 11-25 09:00:00 [core.py:1500] besa.formats.packed.FormatError: q_proj: cut
(EngineCore pid=9) Traceback (most recent call last):
(EngineCore pid=9) besa.formats.packed.FormatError: q_proj: cut
(APIServer pid=8) Traceback (most recent call last):
(APIServer pid=8) RuntimeError: Engine core initialization failed. See root cause above.""",
        "q_proj: cut",
    ),
    "an error of besa's own": (
        """Traceback (most recent call last):
  File "/x/openai_server.py", line 1, in run
besa.errors.BesaError: sparse lacks 2 weights, as a.weight""",
        "sparse lacks 2 weights, as a.weight",
    ),
    "the last of several": (
        """ValueError: the first

During handling of the above exception, another exception occurred:

KeyError: 'the second'""",
        "'the second'",
    ),
    "no error": ("WARNING 11-25 09:00:00 [x.py:1] This may lead to an error: see there", None),
    "nothing": ("", None),
}


@pytest.mark.parametrize("name", LOGS)
def test_the_reason(name: str):
    log, reason = LOGS[name]
    assert reason_of(log.splitlines()) == reason
