"""PyTorch's own layers, enabled: `nn.Linear` fed with events hands back a deferred current, `nn.Conv2d` takes sparse
images as events, batch norms wait for recorded calls."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sparse_backend import autocasting, convolution, policy
from sparse_backend.deferred import WeightCache, defer, unusual
from sparse_backend.events import EventTensor
from sparse_backend.layer_state import STATE
from sparse_backend.ops import FLOATS
from sparse_backend.tensorlike import dense_of, under_saved_tensor_hooks
from sparse_backend.timefusion import recorder
from sparse_backend.timefusion.functions import record_convolution
from sparse_backend.timefusion.recorder import Placeholder, Recording, is_watchable, use
from sparse_backend.timefusion.sites import LinearSite, once

_SKIP_FIRST, _SKIP_MOST = 16, 1024
_LOOK_EVERY = 16


def own_forward(module: Any) -> Any:
    """The framework's own forward of a module's class, as a plain function."""
    function = type(module).forward
    return getattr(function, "__wrapped__", function)


def bias_of(module: Any) -> Tensor | None:
    """A layer's bias, which pruning, parametrizations and people who freeze it put elsewhere than among parameters."""
    if "bias" in module._parameters:
        return module._parameters["bias"]
    return module.bias


def is_surrounded(module: Any) -> bool:
    """Whether hooks before and after each call may give the module other weights for its time: it must run now."""
    return bool(module._forward_pre_hooks and module._forward_hooks)


class InputState:
    """What the dense inputs of an enabled layer were like."""

    __slots__ = ("skip", "skip_next", "static")

    def __init__(self) -> None:
        self.skip, self.skip_next = 0, _SKIP_FIRST  # calls not to be looked at, since inputs were dense
        self.static: tuple[Any, int, EventTensor] | None = None

    def fresh(self, tally: Any = None) -> Any:
        return type(self)()

    @property
    def tally(self) -> None:
        return None

    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()

    def events_of(self, x: Tensor, row_dims: int = 1) -> EventTensor | None:
        """Events of a dense input, None where it has too many.

        After a dense input the next ones are not looked at, more of them each time, so that a dense model does not
        pay. A tensor fed again unchanged, as a static image is at every step, is read once.
        """
        if not policy.has_numbers(x):
            return None  # a replay is to look at what the tensor then holds: torch's own product does
        stateless = under_saved_tensor_hooks()
        if not stateless:
            if self.static is not None:
                seen, version, events = self.static
                if seen() is x and version == x._version and x.untyped_storage().resizable():  # numpy shares it if not
                    return events
            if self.skip:
                self.skip -= 1
                return None
        found = EventTensor.if_sparse(x, policy.MAX_INPUT, row_dims)
        if stateless:
            return found
        if found is None:
            self.skip, self.skip_next = self.skip_next, min(2 * self.skip_next, _SKIP_MOST)
            self.static = None
            return None
        self.skip_next = _SKIP_FIRST
        kept = not (x.requires_grad or x.is_inference() or torch.is_inference_mode_enabled())
        self.static = (weakref.ref(x), x._version, found) if kept else None
        return found


class LinearState(InputState):
    """An enabled Linear's weight as kernels want it, and what its dense inputs were like."""

    __slots__ = ("site", "small", "weights")

    def __init__(self) -> None:
        super().__init__()
        self.weights = WeightCache()
        self.site: Any = None  #: of the forward that records now
        self.small = 0  #: inputs whose events were hardly worth finding

    def events_of(self, x: Tensor, row_dims: int = 1) -> EventTensor | None:
        """The same; None for most small inputs [B, M] since a current became a tensor: the product is then cheaper
        than its events."""
        weights = self.weights
        if weights.made_dense and x.dim() == 2 and not (autocasting.is_on() or under_saved_tensor_hooks()):
            assert weights.weight is not None
            if x.numel() * weights.weight.shape[0] <= policy.SMALL_PRODUCT:
                self.small += 1
                if self.small % _LOOK_EVERY:
                    return None
            weights.made_dense = False
        return super().events_of(x, row_dims)


def linear_forward(module: Any, input: Any) -> Any:
    """An enabled `nn.Linear`'s forward: deferred where its input is events, or dense with few nonzero entries. Its
    dtype is the weight's, under autocast too."""
    if torch.compiler.is_compiling():
        return torch.nn.functional.linear(input, module.weight, module.bias).to(module.weight.dtype)
    if autocasting.is_on():
        input = autocasting.widened(input)
    weight, bias = module._parameters.get("weight"), bias_of(module)
    if weight is None:  # a replica's or a parametrized one
        weight = module.weight
    if is_surrounded(module):
        return torch.nn.functional.linear(dense_of(input), weight, bias).to(weight.dtype)
    state: LinearState = module.__dict__[STATE]
    into = recorder.current()
    if into is not None:
        recorded = record_linear(into, state, weight, bias, input)
        if recorded is not None:
            return recorded
        if type(input) is Placeholder and len(input.shape) != 2:  # not a row of neurons per sample
            return torch.nn.functional.linear(input, weight, bias).to(weight.dtype)
        if type(input) is Tensor and input.dim() == 2 and is_callers(input) and unusual() is None:
            call = functools.partial(linear, state, weight, bias, input)
            return once(into, module, (input, weight, bias), autocasting.state(), call)
    return linear(state, weight, bias, input)


def is_callers(input: Tensor) -> bool:
    """Whether an input, no slice of another tensor, may be fed again at the next step, and a write to it would show."""
    if input.layout is not torch.strided or input.requires_grad:
        return False
    return (input._base is None or input._base.numel() == input.numel()) and is_watchable(input)


def linear(state: LinearState, weight: Tensor, bias: Tensor | None, input: Any) -> Any:
    """The call now: deferred if it can be, computed if not."""
    kind = type(input)
    if unusual() is None:
        events = None
        if kind is EventTensor:
            events = input if input.is_events else None
        elif (
            (kind is Tensor or kind is Parameter)
            and input.dtype is weight.dtype
            and input.dtype in FLOATS
            and input.dim()
            and input.layout is torch.strided
            and input.shape[-1] == weight.shape[1]
            and input.numel()
        ):
            events = state.events_of(input)
        if events is not None:
            current = defer(events, weight, bias, state.weights)
            if current is not None:
                return current
    return torch.nn.functional.linear(dense_of(input), weight, bias).to(weight.dtype)


def convolution_forward(module: Any, input: Any) -> Any:
    """An enabled `nn.Conv2d`'s forward: torch's own, given events where its dense input has few nonzero entries."""
    forward, weight = own_forward(module), module._parameters.get("weight")
    if torch.compiler.is_compiling() or autocasting.is_on() or unusual() is not None or weight is None:
        return forward(module, input)  # a weight that is parametrized is made anew whenever someone asks for it
    if is_surrounded(module):
        return forward(module, dense_of(input))
    into = recorder.current() if module.padding_mode == "zeros" else None
    sliced = type(input) is Tensor and input._base is not None
    images = input
    if into is not None and sliced and input._base is into.sparse.get(module):
        to_record = True  # the next step of what has been seen to be sparse
    else:
        if convolution.can_be_events(input):
            found = module.__dict__[STATE].events_of(input, 3)
            if found is None:
                convolution.paths[weight] = convolution.why_dense(input)
            else:
                images = found
        to_record = type(images) is EventTensor and (images is input or (sliced and is_watchable(input)))
    if into is None or type(input) not in (Tensor, EventTensor):
        return forward(module, images)
    settings = module.stride, module.padding, module.dilation, module.groups
    if to_record:
        recorded = record_convolution(into, input, weight, bias_of(module), *settings)
        if recorded is not None:
            if sliced:
                into.sparse[module] = input._base
            return recorded
    if type(input) is EventTensor or not is_callers(input):
        return forward(module, images)
    call = functools.partial(forward, module, images)
    return once(into, module, (input, weight, bias_of(module)), settings, call)


def batch_norm_forward(module: Any, input: Any) -> Any:
    """An enabled batch norm's forward: torch's own, behind recorded calls that write the same running statistics."""
    if not torch.compiler.is_compiling() and type(input) is not Placeholder:
        into = recorder.enclosing()
        if into is not None and into.has_queued_writes(module.running_mean, module.running_var):
            into.flush(forced=True)
    return own_forward(module)(module, input)


def record_linear(
    into: Recording, state: LinearState, weight: Tensor, bias: Tensor | None, input: Any
) -> Placeholder | None:
    """Record a call, where its input is recorded too, or is a step of events or a slice of a longer tensor.

    Anything else is the caller's own, to be overwritten the next moment: it is read now.
    """
    site: Any = state.site
    autocast = autocasting.state() if autocasting.is_on() else None
    if site is not None and weight is site.weight and bias is site.bias and site.is_under(autocast):
        # The next call of the last one's layer, with the next step of its input?
        if type(input) is Placeholder:
            if input.spec is site.input_spec:
                return site.add((use(input.ref),))[0]
        elif type(input) is Tensor:
            if input._base is site.sliced and site.recording is into and input.shape == site.slice_shape:
                return site.add((input,))[0]
        elif type(input) is EventTensor and input.origin is site.sliced and site.recording is into and input.is_events:
            return site.add((into.input_ref(input),))[0]
    kind = type(input)
    if kind is not Placeholder:
        if kind is Tensor:
            if input._base is None or input.requires_grad or input.layout is not torch.strided:
                return None
            if not is_watchable(input):
                return None
        elif not (kind is EventTensor and input.is_events):
            return None
    shape = input.shape
    if len(shape) != 2 or shape[1] != weight.shape[1] or input.dtype is not weight.dtype or not shape.numel():
        return None
    if weight.dtype not in FLOATS or input.device != weight.device or unusual() is not None:
        return None
    if (
        site is None
        or site.recording is not into
        or site.weight is not weight
        or site.bias is not bias
        or site.mode is not into.mode()
        or site.autocast != autocast
        or site.specs[0].shape[0] != shape[0]
        or not site.is_current()
    ):
        site = LinearSite(into, functools.partial(linear, state, weight, bias), weight, bias)
        into.sites[site] = site
        into.hold(state, site)
    learns = torch.is_grad_enabled() and (
        weight.requires_grad or (bias is not None and bias.requires_grad) or (kind is not Tensor and input.learns)
    )
    site.outputs(weight.device, (torch.Size((shape[0], weight.shape[0])), weight.dtype, learns))
    ref = into.input_ref(input)
    if kind is Tensor:
        into.watch(input)  # and with it, since they share their version, all slices of what it was cut from
        site.sliced, site.slice_shape = input._base, shape
    elif kind is EventTensor and input.origin is not None:
        site.sliced = input.origin
    elif kind is Placeholder and not input._dense_only:
        site.input_spec = input.spec
    return site.add((ref,))[0]
