"""What torch.compile is kept from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which torch.compile does not trace, nor anything it calls: compiled code that comes to it, because
    it meets a stand-in or an op written in Python, goes on behind it."""
    dynamo: Any = torch._C._dynamo.eval_frame  # torch.compiler.disable would import all of dynamo
    skip = dynamo._FrameAction.SKIP
    dynamo.set_code_exec_strategy(function.__code__, dynamo._FrameExecStrategy(skip, skip))
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function
