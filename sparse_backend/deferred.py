"""A linear layer's current that nobody has looked at yet.

A Linear fed with events hands one back. A neuron of ours takes it as it is, and linear and neuron run as one op;
anything else makes it a tensor, computed as usual.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_backend import _native, autocasting, policy
from sparse_backend.events import EventTensor
from sparse_backend.ops import FLOATS
from sparse_backend.ops import hub as hubs
from sparse_backend.ops.event_linear import call_event_linear
from sparse_backend.reference.linear_leaky import sums_dtype
from sparse_backend.tensorlike import TensorLike, implements, inside_custom_function, shaped, undisturbed

_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class WeightHub:
    """One weight during one forward pass: detached, with the token that gathers its gradient (`ops/hub.py`).

    Without a token, weight and bias take part in autograd themselves.
    """

    __slots__ = ("_lowered", "_versions", "bias", "cache", "given", "id", "narrow", "token", "used")

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        token: Tensor | None,
        id: int,
        cache: WeightCache | None = None,
        narrow: torch.dtype | None = None,
    ) -> None:
        """narrow: what autocast casts the weight to, None for nothing; a cache's copy has been cast."""
        self.given, self.bias, self.token, self.id, self.cache = weight, bias, token, id, cache
        self.used, self.narrow = False, narrow
        self._lowered = weight if cache is not None or narrow is None else None
        self._versions = _versions(weight, bias) if cache is None else None

    @property
    def weight(self) -> Tensor:
        """[N, M], as the linear layer multiplies with it."""
        if self._lowered is None:
            with torch.enable_grad():  # its first reader may be under no_grad
                self._lowered = autocasting.lowered(self.given, self.narrow)
        return self._lowered

    @property
    def learns(self) -> bool:
        """Whether gradients flow to the weight or the bias."""
        learns = self.token is not None or self.given.requires_grad
        return learns or (self.bias is not None and self.bias.requires_grad)

    def check_unchanged(self) -> None:
        """Raise RuntimeError if a weight that was not copied has been written to since the layer was called."""
        if self._versions is not None and self._versions != _versions(self.given, self.bias):
            raise RuntimeError(
                f"a layer's output was first looked at after its weight {list(self.given.shape)} was changed "
                "in place. Look at it before: .to_dense() computes it"
            )

    def verified(self) -> WeightHub:
        """This hub, or a new one if the weight was changed behind autograd's back (`.data`, numpy) since its last use.

        Costs a pass over the weight.
        """
        if self.cache is None or not self.used or self.cache.has_moved_on(self) or self.cache.is_current():
            self.check_unchanged()
            self.used = True
            return self
        fresh = self.cache.renew()
        fresh.used = True
        return fresh


class _Served(NamedTuple):
    """A weight as it was when its hub was made. Threads that train one layer replace it, and never see half of one."""

    weight: Tensor
    bias: Tensor | None
    narrow: torch.dtype | None
    key: tuple[Any, ...]  #: versions and modes
    copies: tuple[Tensor, Tensor | None]
    sums: tuple[float, float]
    is_finite: bool
    gatherer: hubs.Gatherer | None
    hub: WeightHub


class WeightCache:
    """What a Linear keeps between calls: its weight in the layout kernels gather from, and the hub in use.

    The copy is [N, M] with strides (1, N padded to whole vectors). It holds no graph but the hub's own node.
    """

    __slots__ = ("_served", "made_dense")

    def __init__(self) -> None:
        self.made_dense = False  #: whether a current was made a tensor, since somebody has set this to False
        self._served: _Served | None = None

    def hub(self, weight: Tensor, bias: Tensor | None, narrow: torch.dtype | None) -> WeightHub | None:
        """The hub for a call now; None where the weight is not finite, whose products with zeros count too.

        narrow: what autocast casts the weight to. Only a parameter has a hub to keep: a weight made anew at every call
        would be copied at every call.
        """
        if type(weight) is not torch.nn.Parameter or weight.is_inference():
            return WeightHub(weight, bias, None, 0, None, narrow)
        served = self._served
        if (
            served is None
            or weight is not served.weight
            or bias is not served.bias
            or self._now(weight, bias, narrow) != served.key
        ):
            served = self._serve(weight, bias, narrow)
        elif served.gatherer is not None and served.gatherer.spent:
            served = self._serve(weight, bias, narrow, served)
        return served.hub if served.is_finite else None

    @staticmethod
    def _now(weight: Tensor, bias: Tensor | None, narrow: torch.dtype | None) -> tuple[Any, ...]:
        # What was copied before a capture is not copied again by its replays, and a copy made in one is a replay's.
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), narrow, policy.is_captured(weight)
        known = weight._version, weight.requires_grad, weight.data_ptr(), weight.dtype, *mode
        return known if bias is None else (*known, bias._version, bias.requires_grad, bias.data_ptr())

    @property
    def weight(self) -> Tensor | None:
        """The parameter itself."""
        return None if self._served is None else self._served.weight

    @property
    def bias(self) -> Tensor | None:
        return None if self._served is None else self._served.bias

    def of_all_steps(self, narrow: torch.dtype | None) -> WeightHub:
        """The parameters for an op that runs all steps at once: they take part in autograd themselves."""
        assert self._served is not None
        return WeightHub(self._served.weight, self._served.bias, None, 0, None, narrow)

    def has_moved_on(self, hub: WeightHub) -> bool:
        """Whether the weight is at another version, or served by another hub, than when this one's copy was made."""
        served = self._served
        assert served is not None
        return hub is not served.hub or self._now(served.weight, served.bias, served.narrow) != served.key

    def is_current(self) -> bool:
        """Whether the copies still equal the weight, judged by its sum."""
        served = self._served
        return served is not None and _sums(served.weight, served.bias) == served.sums

    def renew(self) -> WeightHub:
        """A new hub for the weight in use, whose copies are made again if it is not what they are."""
        served = self._served
        assert served is not None
        return self._serve(served.weight, served.bias, served.narrow, served).hub

    def _serve(
        self, weight: Tensor, bias: Tensor | None, narrow: torch.dtype | None, before: _Served | None = None
    ) -> _Served:
        """before: what was served, whose copies may do."""
        key, sums = self._now(weight, bias, narrow), _sums(weight, bias)
        lowered = autocasting.lowered(weight, narrow)
        if before is not None and sums == before.sums:
            copies = before.copies
        else:
            copies = _transposed(lowered.detach()), None if bias is None else bias.detach().clone()
        token, id = None, 0
        if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            id = hubs.new_id()
            token = hubs.call_hub(lowered, bias, id)
        hub = WeightHub(*copies, token, id, self, narrow)
        finite = all(map(math.isfinite, sums))
        self._served = served = _Served(weight, bias, narrow, key, copies, sums, finite, hubs.find(id), hub)
        return served


def _sums(weight: Tensor, bias: Tensor | None) -> tuple[float, float]:
    if not policy.reads_at_once(weight.device):
        return 0.0, 0.0  # reading them would wait for the device
    return float(weight.detach().sum()), 0.0 if bias is None else float(bias.detach().sum())


def is_finite(weight: Tensor) -> bool:
    """Where it is not, zeros of the input count too: 0 * inf. Not checked on another device: the check would wait."""
    return not policy.reads_at_once(weight.device) or math.isfinite(float(weight.detach().sum()))


def _versions(weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    return (
        0 if weight.is_inference() else weight._version,
        0 if bias is None or bias.is_inference() else bias._version,
    )


def _transposed(weight: Tensor) -> Tensor:
    neurons, inputs = weight.shape
    buffer = weight.new_zeros(inputs, hubs.padded(neurons))
    buffer[:, :neurons].copy_(weight.t())
    return buffer[:, :neurons].t()


class DeferredCurrent(TensorLike):
    """events [..., M], weight [N, M], bias [N] -> current [..., N], when somebody asks."""

    __slots__ = ("_dense", "_learns", "_looked", "_within", "dtype", "events", "hub", "shape")

    def __init__(self, events: EventTensor, hub: WeightHub) -> None:
        self.events, self.hub = events, hub
        self.shape = torch.Size((*events.shape[:-1], hub.given.shape[0]))
        self.dtype = sums_dtype(hub.given)
        self._dense: Tensor | None = None
        self._looked, self._learns, self._within = False, torch.is_grad_enabled(), _hooks(True)

    def adopt(self, cache: WeightCache) -> None:
        """Let the neuron that takes this current keep the weight's hub, where the Linear keeps none."""
        hub = self.hub
        if hub.cache is None and hub.token is None:
            adopted = cache.hub(hub.given, hub.bias, hub.narrow)
            if adopted is not None:
                self.hub = adopted
            else:
                self._looked = True
                self._dense = self.by_torch()

    def by_torch(self) -> Tensor:
        """The current as torch computes it: where the weight is not finite, its products with zeros count too."""
        return torch.nn.functional.linear(self.events.to_dense(), self.hub.weight, self.hub.bias).to(self.dtype)

    @property
    def device(self) -> torch.device:
        return self.hub.given.device

    @property
    def learns(self) -> bool:  # type: ignore[override]
        return self._learns and (self.hub.learns or self.events.learns)

    @property
    def is_deferred(self) -> bool:
        """Whether a neuron may still take events and weight instead of the current: not inside a checkpoint that it
        came to from outside, whose second run may find it looked at."""
        return not self._looked and _hooks(True) == self._within

    def _embody(self) -> None:
        looked = self._looked
        super()._embody()
        self._looked = looked

    def to_dense(self, *_: Any, **__: Any) -> Tensor:
        self._looked = True
        if self._dense is None:
            events = self.events
            hub = self.hub = self.hub.verified()
            if hub.cache is not None:
                hub.cache.made_dense = True
            _native.load()
            with torch.set_grad_enabled(self._learns), undisturbed(inference=not self._learns):
                flat = call_event_linear(
                    events.row_ptr, events.indices, events.values, events.handle, events.active_ptr,
                    events.active_indices, hub.weight, hub.bias, hub.token, hub.id,
                )  # fmt: skip
            self._dense = shaped(flat, self.shape)
            for reader in self._readers:
                reader.watch(self._dense)
        return self._dense

    def __repr__(self) -> str:
        return f"DeferredCurrent(shape={list(self.shape)}, from={self.events!r})"


def defer(
    events: EventTensor, weight: Tensor, bias: Tensor | None, cache: WeightCache | None = None
) -> DeferredCurrent | None:
    """The current of a linear layer fed with events; None where torch's own linear has to run.

    Raises RuntimeError as torch does where the sizes do not fit. cache: the Linear's own, if it has one.
    """
    if events.dtype != weight.dtype or weight.dtype not in FLOATS or weight.dim() != 2:
        return None
    if events.columns != events.shape[-1]:
        return None
    neurons, inputs = weight.shape
    if events.shape[-1] != inputs:
        rows = events.shape[:-1].numel()
        raise RuntimeError(
            f"mat1 and mat2 shapes cannot be multiplied ({rows}x{events.shape[-1]} and {inputs}x{neurons})"
        )
    if events.device != weight.device or not events.numel() or not neurons:
        return None
    if bias is not None and (bias.dtype != weight.dtype or bias.shape != (neurons,)):
        return None
    if not torch.is_grad_enabled():  # though whoever takes the current may run under another mode
        events = events.without_handle() if events.learns else events
        if cache is None:
            weight, bias = weight.detach(), None if bias is None else bias.detach()
    narrow = autocasting.dtype_of(weight) if autocasting.is_on() else None
    hub = WeightHub(weight, bias, None, 0, None, narrow) if cache is None else cache.hub(weight, bias, narrow)
    return None if hub is None else DeferredCurrent(events, hub)


@implements(torch.nn.functional.linear)
def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """`linear` of spikes of ours, wherever it is called from."""
    if type(input) is not EventTensor or not input.is_events or torch.compiler.is_compiling() or unusual() is not None:
        return NotImplemented
    if not isinstance(weight, Tensor) or isinstance(weight, TensorLike) or isinstance(bias, TensorLike):
        return NotImplemented
    current = defer(input, weight, bias)
    return NotImplemented if current is None else current


@implements(Tensor.float, Tensor.to)
def _cast(x: Any, dtype: Any = torch.float32, *more: Any, **options: Any) -> Any:
    """`cur.float()` where it is so already: the same object, as torch has it."""
    return x if x.dtype is dtype and not more and not options else NotImplemented


def unusual() -> str | None:
    """Why ops of ours cannot stand in for torch's in the running call, if so."""
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is running"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode AD is on"
    if inside_custom_function():
        return "a custom autograd function is running"
    return None
