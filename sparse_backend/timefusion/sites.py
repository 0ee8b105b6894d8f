"""What a run of recorded calls of one layer does. Each site turns T calls into one, and one call into the step form."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_backend import policy
from sparse_backend.deferred import DeferredCurrent, defer, is_finite
from sparse_backend.events import EventTensor
from sparse_backend.ops import keeping
from sparse_backend.tensorlike import TensorLike, dense_of, learns_of
from sparse_backend.timefusion.recorder import Node, Placeholder, Recording, Run, Site, is_again, value

_NOTHING = object()


def collect(refs: Sequence[Any]) -> Any:
    """One input of T calls as a sequence [T, ...]: what an earlier run made, the tensor its slices were cut from, or
    the steps stacked."""
    first = refs[0]
    if type(first) is tuple:
        sequence = _whole_run(refs)
        if sequence is not None:
            return sequence
        if type(value(first)) is DeferredCurrent:  # a linear layer's of one step each, computed as they were asked for
            refs = [value(ref) for ref in refs]
            whole = _joined(refs)
            if whole is not None:
                return whole
    elif type(first) is EventTensor:
        whole = _events(refs)
        if whole is not None:
            return whole
    elif type(first) is DeferredCurrent:
        whole = _joined(refs)
        if whole is not None:
            return whole
    elif not isinstance(first, TensorLike):
        whole = _sliced(refs)
        if whole is not None:
            return whole
    return torch.stack([dense_of(value(ref)) for ref in refs])


def _events(refs: Sequence[Any]) -> EventTensor | None:
    """The caller's own events as one sequence: what they are steps of, or copies of them one below the other."""
    first = refs[0]
    if any(
        type(ref) is not EventTensor or not ref.is_events or ref.shape != first.shape or ref.columns != first.columns
        for ref in refs
    ):
        return None
    steps = [ref.whole for ref in refs]
    origin = steps[0].origin
    whole = None
    if origin is not None and (len(steps) == origin.shape[0] or is_known(first)):
        whole = origin.steps_like(steps)
    if whole is not None:
        shape = torch.Size((len(refs), *first.shape))
        return whole if whole.shape == shape else whole.reshaped(shape)
    if not is_known(first) or any(ref.learns and ref.active_ptr is None for ref in refs):
        return None
    return EventTensor.stack(refs)


def is_known(events: EventTensor) -> bool:
    """Whether how many there are is known without waiting for the device."""
    return policy.reads_at_once(events.device)


def _whole_run(refs: Sequence[Any]) -> Any:
    """What one run made, where `refs` are all its steps, or some that follow each other."""
    node, slot = refs[0]
    run, first = node.run, node.index
    for t, ref in enumerate(refs):
        if type(ref) is not tuple or ref[1] != slot or ref[0].run is not run or ref[0].index != first + t:
            return None
    sequence = run.sequence(slot)
    if sequence is None or len(refs) == run.length:
        return sequence
    if type(sequence) is EventTensor and sequence.is_events and sequence.has_steps and is_known(sequence):
        return sequence.some_steps(first, first + len(refs))
    return None if isinstance(sequence, TensorLike) else sequence[first : first + len(refs)]


def _sliced(refs: Sequence[Any]) -> Tensor | None:
    """The sequence whose slices `refs` are, without a copy; None if they are not, or if gradients flow to them."""
    first = refs[0]
    base = first._base
    if base is None or first.requires_grad or len(refs) < 2 or type(refs[1]) is tuple:
        return None
    shape, stride, offset = first.shape, first.stride(), first.storage_offset()
    step = refs[1].storage_offset() - offset
    for t, ref in enumerate(refs):
        if type(ref) is tuple or isinstance(ref, TensorLike) or ref._base is not base or ref.requires_grad:
            return None
        if ref.storage_offset() != offset + t * step or ref.shape != shape or ref.stride() != stride:
            return None
    if step <= 0:
        return None
    return base.detach().as_strided((len(refs), *shape), (step, *stride), offset)


def _joined(refs: Sequence[Any]) -> DeferredCurrent | None:
    """The current of all steps, where each step's is a deferred one of one weight and of the caller's own events."""
    hub = refs[0].hub
    for ref in refs:
        if type(ref) is not DeferredCurrent or not ref.is_deferred or ref.events.learns or ref.hub is not hub:
            return None
    if hub.cache is None or hub.cache.weight is None or hub.cache.has_moved_on(hub):
        return None
    return DeferredCurrent(EventTensor.stack([ref.events for ref in refs]), hub.cache.of_all_steps(hub.narrow))


def same_at_every_step(refs: Sequence[Any]) -> bool:
    """Whether the calls were all given one and the same thing (a static image)."""
    first = refs[0]
    if type(first) is tuple:
        run = first[0].run
        return type(run) is Constant and all(type(ref) is tuple and ref[0].run is run for ref in refs)
    if type(first) is DeferredCurrent:
        return all(
            type(ref) is DeferredCurrent and ref.is_deferred and ref.events is first.events and ref.hub is first.hub
            for ref in refs
        )
    return all(is_again(ref, first) for ref in refs)


class Constant(Run):
    """One value that is the result of every step."""

    __slots__ = ()

    def __init__(self, result: Any) -> None:
        super().__init__([None], 1, [result])

    @property
    def is_constant(self) -> bool:
        return True

    def get(self, slot: int, index: int) -> Any:
        return self._last[slot]


def share(nodes: Sequence[Node], run: Run) -> None:
    for index, node in enumerate(nodes):
        node.run, node.index = run, index


class GivenSite(Site):
    """What was computed at once, and is the result of every call that would compute it again."""

    def __init__(self, recording: Recording, result: Any) -> None:
        super().__init__(recording)
        self.outputs(result.device, (result.shape, result.dtype, learns_of(result)))
        self.result = Constant(result)

    def hand_out(self) -> Placeholder:
        """The result of one more call."""
        node = Node(self, (), ())
        share([node], self.result)
        return self.placeholders(node)[0]


def once(
    into: Recording, module: Any, tensors: Sequence[Tensor | None], settings: Any, call: Callable[[], Any]
) -> Placeholder:
    """What a module gives for these tensors under these settings: computed now, and not again where the next step gives
    it the same (a static image)."""
    given = [(tensor, None if tensor is None else (tensor._version, tensor.requires_grad)) for tensor in tensors]
    known = Recording.mode(), settings, given
    before = into.given.get(module)
    if before is None or before[0][:2] != known[:2] or not _are_same(before[0][2], given):
        before = into.given[module] = known, GivenSite(into, call())
    return before[1].hand_out()


def _are_same(before: Sequence[Any], now: Sequence[Any]) -> bool:
    return all(is_again(b[0], a[0]) and a[1] == b[1] for a, b in zip(before, now, strict=True))


class FunctionSite(Site):
    """A function of one step's tensors."""

    def __init__(
        self,
        recording: Recording,
        function: Callable[..., Any],
        folded: Callable[..., Tensor | None] | None,
        reads: Sequence[Tensor] = (),
        *,
        of_events: bool = False,
    ) -> None:
        """folded: the same of sequences [T, ...], given which of its tensors are one for all steps; None where the
        steps must run one by one, in their order. of_events: whether it has a sparse form of its own."""
        super().__init__(recording, reads)
        self.function, self.folded, self.of_events = function, folded, of_events

    def execute(self, nodes: list[Node]) -> None:
        if self.folded is not None and len(nodes) > 1:
            columns = list(zip(*(node.inputs for node in nodes), strict=True))
            constant = [same_at_every_step(refs) for refs in columns]
            tensors = [value(refs[0]) if same else collect(refs) for refs, same in zip(columns, constant, strict=True)]
            if not self.of_events:
                tensors = [dense_of(tensor) for tensor in tensors]
            if all(constant):
                share(nodes, Constant(self.function(*tensors)))
                return
            result = self.folded(len(nodes), constant, *tensors)
            if result is not None:
                share(nodes, Run([result], len(nodes)))
                return
        for node in nodes:
            result = self.function(*[value(ref) for ref in node.inputs])
            node.run, node.index = Run([None], 1, [result]), 0


class LinearSite(Site):
    """A linear layer: its events over all steps, multiplied when the neurons behind it run."""

    def __init__(self, recording: Recording, step: Callable[[Any], Any], weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(recording, [weight] if bias is None else [weight, bias])
        self.step, self.weight, self.bias = step, weight, bias
        self.sliced: Any = _NOTHING  #: what the last input was cut from
        self.slice_shape = torch.Size()

    def is_under(self, autocast: Any) -> bool:
        """Whether this is the autocast it was made under, and weight and bias require grad as they did."""
        same = self.autocast == autocast and self.weight.requires_grad is self.reads[0][2]
        return same and (self.bias is None or self.bias.requires_grad is self.reads[1][2])

    def forget(self) -> None:
        super().forget()
        self.sliced = _NOTHING

    def execute(self, nodes: list[Node]) -> None:
        refs = [node.inputs[0] for node in nodes]
        if len(nodes) == 1 or same_at_every_step(refs):
            current = self.step(value(refs[0]))
            share(nodes, Constant(current))
            return
        whole = collect(refs)
        events = None
        if type(whole) is EventTensor:
            events = whole
        elif policy.has_numbers(whole):
            events = EventTensor.if_sparse(whole, policy.MAX_INPUT)
        if events is not None and events is not whole:
            keeping.made(events.columns, (events.row_ptr, events.indices))
        weight, bias = self.weight, self.bias
        if self.switched:  # they are as recorded now, and will not be when the neurons run
            weight = weight.view_as(weight)
            bias = None if bias is None else bias.view_as(bias)
        current = None
        if events is not None and is_finite(weight):
            current = defer(events, weight, bias)
        if current is None:
            current = torch.nn.functional.linear(dense_of(whole), weight, bias).to(weight.dtype)
        else:
            self.recording.lazy.append(weakref.ref(current))
        share(nodes, Run([current], len(nodes)))


class NeuronSite(Site):
    """A neuron layer. Its first output is the sequence it is there for (spikes, or a readout's membrane); from
    `states_at` on outputs are kept as sequences only where somebody asks for them.

    step(current, *states) -> outputs of one call as the step form runs it;
    sequence(current [T, ...], states, keep) -> sequences of all outputs, None where not in `keep` (one flag per output
    from `states_at` on), and the last step of each, None where it is cut from the sequence.
    """

    is_neuron = True

    def __init__(
        self, recording: Recording, step: Callable[..., Any], sequence: Callable[..., Any], reads: Sequence[Tensor]
    ) -> None:
        super().__init__(recording, reads)
        self.step, self.sequence = step, sequence

    def execute(self, nodes: list[Node]) -> None:
        refs = [node.inputs[0] for node in nodes]
        starts = [value(state) for state in nodes[0].states]
        n_outputs = len(self.specs)
        if len(nodes) == 1:
            share(nodes, Run([None] * n_outputs, 1, self.step(value(refs[0]), *starts)))
            return
        if same_at_every_step(refs):
            one = dense_of(value(refs[0]))
            current = one.expand(len(refs), *one.shape)
        else:
            current = collect(refs)
        earlier = nodes[:-1]
        keep = [any(node.asked_for(slot) for node in earlier) for slot in range(self.states_at, n_outputs)]
        sequences, last = self.sequence(current, starts, keep)
        share(nodes, Run(sequences, len(nodes), last))


class SumSite(Site):
    """A running sum, total = total + x. Its steps are formed only if somebody kept them."""

    def __init__(self, recording: Recording) -> None:
        super().__init__(recording)
        self.states_at, self.state_slots = 0, (0,)

    def execute(self, nodes: list[Node]) -> None:
        start = value(nodes[0].states[0])
        if len(nodes) == 1:
            share(nodes, Run([None], 1, [dense_of(start) + dense_of(value(nodes[0].inputs[0]))]))
            return
        steps = collect([node.inputs[0] for node in nodes])
        if any(node.asked_for(0) for node in nodes[:-1]):
            totals = dense_of(start) + dense_of(steps).cumsum(0, dtype=self.specs[0].dtype)
            share(nodes, Run([totals], len(nodes)))
        else:
            dtype = self.specs[0].dtype
            total = (steps if steps.dtype is dtype else dense_of(steps)).sum(0, dtype=dtype)
            share(nodes, Run([None], len(nodes), [dense_of(start) + total]))
