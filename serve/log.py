"""The line of an engine's log that says why it ended.

>>> reason_of(["Usage: transformers serve [OPTIONS]", "error: No such option: --prot"])
'No such option: --prot'

Engines end with the traceback of the process that noticed, which is seldom the one that failed:
what counts is the last error that does not point to another one.
"""

from __future__ import annotations

import re

# vLLM's processes and loggers begin a line with their own names.
_PREFIX = re.compile(r"^(\([^()]*\bpid=\d+[^()]*\) ?)?([A-Z]+ \d\d-\d\d [\d:]+ \[[^\]]*\] ?)?")
_EXCEPTION = re.compile(r"^(?:[\w.]*\.)?(\w*(?:Error|Exception|Exit)): (.+)")
_USAGE = re.compile(r"^(?:[\w .-]+: )?error: (.+)", re.IGNORECASE)
_ELSEWHERE = re.compile(r"root cause|Failed core proc|initialization failed due to|EngineDeadError")
_PYDANTIC = re.compile(r"validation errors? for \w+")


def reason_of(lines: list[str]) -> str | None:
    """Why the engine ended, from its log; None where no line tells."""
    bare = [_PREFIX.sub("", line) for line in lines]
    reason = None
    for position, line in enumerate(bare):
        if _ELSEWHERE.search(line):
            continue
        if usage := _USAGE.match(line):
            reason = usage[1]
        elif exception := _EXCEPTION.match(line):
            reason = exception[2]
            if _PYDANTIC.search(reason):  # what is wrong follows
                what = "".join(bare[position + 1 : position + 2])
                reason = what.partition(" [type=")[0].strip().removeprefix("Value error, ")
    return reason.strip() if reason else None
