"""What `torch.autocast` means to layers of ours.

It makes products with a weight those of a narrower one, as it does torch's own. Currents, membranes and sums stay as
wide as the parameters: a membrane in bfloat16 forgets what arrives in steps smaller than 1/256 of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

NARROW = (torch.float16, torch.bfloat16)

#: whether autocast is on for any kind of device
is_on = torch._C._is_any_autocast_enabled
#: torch without it
Off = torch._C._DisableAutocast

_DEVICES = ("cpu", "cuda")

#: per kind of device its dtype, None where autocast is off, and whether casts of weights are kept
State = tuple[tuple[torch.dtype | None, ...], bool]


def dtype_of(tensor: Tensor) -> torch.dtype | None:
    """What autocast casts a tensor to before a product, here and now; None where it leaves it as it is."""
    if not is_on() or tensor.dtype is not torch.float32 or not _reaches(tensor):
        return None
    return torch.get_autocast_dtype(tensor.device.type)


def _reaches(tensor: Tensor) -> bool:
    device = tensor.device.type
    return device in _DEVICES and torch.is_autocast_enabled(device)


def lowered(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight with the numbers of `dtype`, differentiably, in the dtype that kernels gather from: that one on CUDA,
    its own elsewhere. As it is for None."""
    if dtype is None:
        return weight
    narrow = weight.to(dtype)
    return narrow if weight.is_cuda else narrow.to(weight.dtype)


def rounded(weight: Tensor) -> Tensor:
    """A weight of any shape whose numbers are those autocast casts it to, differentiably, in its own dtype."""
    return lowered(weight, dtype_of(weight)).to(weight.dtype)


def widened(x: Any) -> Any:
    """Half and bfloat16 as float32, the dtype of states and sums: on CUDA, and under autocast. All else as it is."""
    return x.float() if isinstance(x, Tensor) and x.dtype in NARROW and (x.is_cuda or _reaches(x)) else x


def state() -> State | None:
    """What of autocast is on; None where nothing is."""
    if not is_on():
        return None
    on = (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None for device in _DEVICES)
    return tuple(on), torch.is_autocast_cache_enabled()


def is_now(known: State | None) -> bool:
    """Whether autocast is as it was when `state()` gave `known`."""
    return known == state() if is_on() else known is None


@contextmanager
def restored(known: State | None) -> Iterator[None]:
    """Torch with autocast as it was when `state()` gave `known`."""
    with ExitStack() as stack:
        if known is None:
            stack.enter_context(Off())
        else:
            dtypes, cache = known
            for device, dtype in zip(_DEVICES, dtypes, strict=True):
                if dtype is not None or torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, dtype, dtype is not None, cache))
        yield
