"""Recording a forward pass, and running what was recorded."""

from __future__ import annotations

import gc
import itertools
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sparse_backend import autocasting
from sparse_backend.compiling import not_compiled
from sparse_backend.events import EventTensor
from sparse_backend.tensorlike import TensorLike, dense_of, nothing_of, undisturbed

_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_grad_enabled = torch.is_grad_enabled
_functorch_active = torch._C._are_functorch_transforms_active
_make_subclass = Tensor._make_subclass
_weak = weakref.ref

#: most calls that run before their turn for one another: a chain of them is a chain of Python's own calls
_DEEPEST = 32


class Run:
    """What one execution of a site gave: per output a sequence, and its steps when somebody asks for one."""

    __slots__ = ("_handed", "_inference", "_last", "_mode", "_sequences", "_steps", "length")

    def __init__(self, sequences: Sequence[Any], length: int, last: Sequence[Any] | None = None) -> None:
        """sequences: per output [T, ...], or None where nobody can ask for any step but the last; last: per output
        the value of the last step, or None where it is cut from the sequence."""
        self._sequences, self.length, self._mode = list(sequences), length, _grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._last = list(last) if last is not None else [None] * len(self._sequences)
        self._steps: list[Sequence[Any] | None] = [None] * len(self._sequences)
        self._handed: dict[int, int] = {}  # outputs the caller has as a whole: at which version

    def hand_out(self, slot: int) -> Any:
        """All steps of one output as the caller's own tensor."""
        sequence = self.sequence(slot)
        if type(sequence) is EventTensor and sequence.is_events:
            return sequence if torch.is_grad_enabled() or not sequence.learns else sequence.without_handle()
        sequence = dense_of(sequence)
        if sequence.requires_grad and not torch.is_grad_enabled():
            return sequence.detach().clone()
        if slot in self._handed or self._steps[slot] is not None or sequence.is_inference():
            return sequence.clone()
        self._handed[slot] = sequence._version
        return sequence

    @property
    def is_constant(self) -> bool:
        """Whether all steps have one and the same value."""
        return False

    def sequence(self, slot: int) -> Any:
        """All steps [T, ...] of one output, as events or a tensor, or None if they were not kept."""
        sequence = self._sequences[slot]
        version = self._handed.get(slot)
        if version is not None and sequence._version != version:
            raise RuntimeError(
                "time fusion: torch.stack of all steps was changed in place, and then one of the steps was read. "
                "Change a clone() of it, or run step by step: sparse_backend.enable(net, fuse_time=False)"
            )
        return sequence

    def get(self, slot: int, index: int) -> Any:
        """One step of one output. Tensors cut from a sequence share one node in the graph, so that the cost of their
        gradients is linear in T."""
        if index == self.length - 1 and self._last[slot] is not None:
            return self._last[slot]
        steps = self._steps[slot]
        if steps is None:
            sequence = self.sequence(slot)
            # In the mode it ran in, not that of its first reader.
            with undisturbed(_hooks(True), self._inference), torch.set_grad_enabled(self._mode):
                if type(sequence) is EventTensor and sequence.is_events and sequence.has_steps:
                    steps = [sequence.step(t) for t in range(self.length)]
                else:
                    steps = dense_of(sequence).unbind(0)
            self._steps[slot] = steps
        return steps[index]


class Node:
    """One recorded call. inputs and states are tensors or (node, slot) of an earlier call."""

    __slots__ = ("index", "inputs", "outputs", "run", "site", "states", "taken", "used")

    def __init__(self, site: Site, inputs: tuple[Any, ...], states: tuple[Any, ...]) -> None:
        self.site, self.inputs, self.states = site, inputs, states
        self.run: Run | None = None
        self.index = 0
        self.outputs: tuple[Any, ...] = ()  # weak references to the placeholders handed out, None where nobody asks
        self.used = self.taken = 0  # bits of outputs: other calls take it; the layer's next call takes it as its state

    def asked_for(self, slot: int) -> bool:
        """Whether anyone but the next step can still ask for this output."""
        if self.used >> slot & 1:
            return True
        output = self.outputs[slot]()
        return output is not None and output.ref[0] is self

    def watch_outputs(self, outputs: Sequence[Placeholder]) -> None:
        """Say who stands for the outputs, for `asked_for`."""
        first = self.site.states_at
        self.outputs = (*(None,) * first, *map(_weak, outputs[first:]))


def value(ref: Any) -> Any:
    """The tensor or EventTensor a reference stands for; its node has run."""
    if type(ref) is tuple:
        node, slot = ref
        return node.run.get(slot, node.index)
    return ref


class Spec:
    """What is known of an output before it has run. Outputs of one site share one, so that a call that is given what
    the last one was given is known by identity."""

    __slots__ = ("device", "dtype", "learns", "nothing", "recording", "shape")

    def __init__(
        self, recording: Recording, shape: torch.Size, dtype: torch.dtype, device: torch.device, learns: bool
    ) -> None:
        self.recording, self.shape, self.dtype, self.device, self.learns = recording, shape, dtype, device, learns
        self.nothing = nothing_of(dtype)


class Placeholder(TensorLike):
    """An output of a recorded call. Knows its shape; its numbers come when the recording runs."""

    __slots__ = ("ref", "spec")

    ref: tuple[Node, int]
    spec: Spec
    _dense: Tensor | None = None
    _base_of: tuple[Placeholder, Callable[[Tensor], Tensor]] | None = None  # what it is a view of, and how
    _views: tuple[weakref.ref[Placeholder], ...] = ()

    @property
    def shape(self) -> torch.Size:
        return self.spec.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.spec.dtype

    @property
    def device(self) -> torch.device:
        return self.spec.device

    @property
    def learns(self) -> bool:  # type: ignore[override]
        return self.spec.learns

    def run(self) -> None:
        """Run the recording if it has not run yet."""
        if self.ref[0].run is None:
            self.spec.recording.flush(forced=True)

    def value(self) -> Any:
        """The tensor or EventTensor this stands for."""
        if self._dense_only:
            return self._dense
        self.run()
        node, slot = self.ref
        if node.run is None:
            raise RuntimeError("time fusion: the forward pass that was to compute this value raised an error")
        return node.run.get(slot, node.index)

    def to_dense(self, *_: Any, **__: Any) -> Tensor:
        if self._dense is None:
            with undisturbed(self.spec.recording.hooks, self.spec.recording.inference):
                self._dense = dense_of(self.value())
        return self._dense

    @property
    def has_value(self) -> bool:
        """Whether what it stands for has run."""
        return self._dense is not None or self.ref[0].run is not None

    @property
    def is_view(self) -> bool:
        return self._base_of is not None

    def views(self, base: Placeholder, again: Callable[[Tensor], Tensor]) -> None:
        """Say that this may share the memory of `base`: `again` makes it of base's values."""
        self._base_of = base, again
        base._views = (*base._views, _weak(self))

    def dense_from_now_on(self) -> Tensor:
        """What is written to it is written to what it is a view of, and to the views of it. Calls recorded before
        that take what it is now."""
        self.spec.recording.flush(forced=True)
        if not self._dense_only:
            with torch.set_grad_enabled(self.ref[0].site.mode):
                if self._base_of is not None:
                    base, again = self._base_of
                    if not base._dense_only:
                        base.dense_from_now_on()
                    elif self._dense is None:
                        self._take(again(base.to_dense()))
                else:
                    self._take(self._alone())
        return self.to_dense()

    def _alone(self) -> Tensor:
        """Its values in memory of its own: a step cut from a sequence may not be written to, nor what all steps are."""
        tensor = self.to_dense()
        shared = (tensor._base is not None and tensor.requires_grad) or self.ref[0].run.is_constant  # type: ignore[union-attr]
        return tensor.clone() if shared else tensor

    def _take(self, tensor: Tensor) -> None:
        """Stand for this tensor alone from now on, and the views of it for its views."""
        self._dense, self._dense_only = tensor, True
        spec = self.spec  # not that of its site any more: whoever knows it by its spec looks again
        self.spec = Spec(spec.recording, spec.shape, spec.dtype, spec.device, spec.learns)
        for weak in self._views:
            view = weak()
            if view is not None and view._base_of is not None and not view._dense_only:
                view._take(view._base_of[1](tensor))

    def take_shape(self) -> None:
        spec, shape = self.spec, self.to_dense().shape
        if spec.shape != shape:
            self.spec = Spec(spec.recording, shape, spec.dtype, spec.device, spec.learns)

    def __repr__(self) -> str:
        return repr(self.to_dense())

    @classmethod
    @not_compiled
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from sparse_backend.timefusion.functions import on_placeholders

        result = on_placeholders(func, args, kwargs or {})
        if result is not NotImplemented:
            return result
        return super().__torch_function__(func, types, args, kwargs)


class Site:
    """A place in the user's code whose calls may run together: same layer, same settings."""

    #: most calls to run at once: how many steps of its inputs and outputs stay in cache
    most = sys.maxsize
    #: whether it may run before its turn so that a layer behind it sees more steps at once
    pulled = True
    is_neuron = False

    def __init__(self, recording: Recording, reads: Sequence[Tensor] = ()) -> None:
        """reads: the caller's tensors that every call of this site uses, as they are now."""
        self.recording = recording
        self.mode, self.autocast = Recording.mode(), autocasting.state()
        self.queue: list[Node] = []
        self.place = 0  #: calls of the queue that have run
        self.called = 0  #: calls before those of the queue
        self.switched = False  #: what it reads requires grad only while it runs, or only while it does not
        self.gathering = False  #: calls that run next are being sought
        self.reads = [_as_it_is(tensor) for tensor in reads]
        self.specs: tuple[Spec, ...] = ()
        self.state_slots: tuple[int, ...] = ()  #: which outputs its next call takes as its states, in their order
        self.states_at = 1  #: outputs from here on are states or may be asked for step by step
        self.input_spec: Any = None  #: what the last call was given: the next one that is given the same
        self.state_specs: tuple[Any, ...] = ()  #: needs no other look
        self.copied: tuple[Tensor, int, Tensor] | None = None  #: see `Recording.tensor_ref`

    def outputs(self, device: torch.device, *outputs: tuple[torch.Size, torch.dtype, bool]) -> None:
        """Say what calls from now on give: shape, dtype, and whether gradients flow."""
        if len(self.specs) != len(outputs) or any(
            spec.shape != shape or spec.dtype is not dtype or spec.learns is not learns or spec.device != device
            for spec, (shape, dtype, learns) in zip(self.specs, outputs, strict=True)
        ):
            self.specs = tuple([Spec(self.recording, shape, dtype, device, learns) for shape, dtype, learns in outputs])

    def add(self, inputs: tuple[Any, ...], states: tuple[Any, ...] = ()) -> list[Placeholder]:
        """Record one call; returns a placeholder for each output."""
        node = Node(self, inputs, states)
        made = self.placeholders(node)
        if self.states_at < len(self.specs):
            node.watch_outputs(made)
        self.queue.append(node)
        self.recording.pending.append(node)
        return made

    def placeholders(self, node: Node) -> list[Placeholder]:
        """One for each output of a call."""
        specs = self.specs
        made = []
        for slot, spec in enumerate(specs):
            output = _make_subclass(Placeholder, *spec.nothing)
            output.ref, output.spec = (node, slot), spec
            made.append(output)
        return made

    def read_again(self) -> None:
        """Nothing is recorded: what it reads may have changed."""
        self.reads = [_as_it_is(tensor) for tensor, *_ in self.reads]

    def is_current(self) -> bool:
        """Whether the tensors it reads are as they were."""
        return all(
            _numbers(tensor) == numbers and tensor.requires_grad is learned for tensor, numbers, learned in self.reads
        )

    def forget(self) -> None:
        """What was recorded has run: the next call is looked at closely again."""
        self.called += len(self.queue)
        self.queue.clear()
        self.place, self.input_spec, self.gathering = 0, None, False

    def execute(self, nodes: list[Node]) -> None:
        """Run these calls, in order, and give each its `run` and `index`. All their inputs have run."""
        raise NotImplementedError


class Recording:
    """What one forward pass has asked for and not yet got."""

    def __init__(self) -> None:
        self.sites: dict[Any, Site] = {}
        self.hooks, self.grad_mode = _hooks(True), _grad_enabled()
        self.inference = torch.is_inference_mode_enabled()
        self.pending: list[Node] = []
        self.watched: list[tuple[Tensor, int]] = []
        self.reading: list[TensorLike] = []  #: the caller's spikes and currents that calls have yet to read
        self.lazy: list[weakref.ref[TensorLike]] = []  #: currents of linear layers that have run, not computed yet
        self.waiting: list[Any] = []  #: the caller's tensors that wait for writes: see `buffers.py`
        self.summed: dict[int, Tensor] = {}  #: the caller's tensors that a running sum began with
        self.longest = 0  #: steps of a neuron layer's longest run so far
        self.ran = self.runs = 0  #: calls of neuron layers that have run, and in how many runs
        self.chunk = sys.maxsize  #: most calls that layers now run at once
        self.pulling = 0  #: calls that now run before their turn, one for the other
        self.meets_itself = False  #: whether what was to run before its turn waits for a layer that is to run now
        self.in_order = False  #: whether a neuron layer ran a call alone, since the next one waits for what it gives
        self.calls = 0  #: most calls of one site: where none was called twice, there was no loop
        self.holders: list[Any] = []  #: states of layers that know their last call's site
        self.put_back: dict[Any, Callable[[], None]] = {}  #: module that holds its own state -> gives it values
        self.given: dict[Any, tuple[Any, Any]] = {}  #: module -> what its last call was given, and what gives it again
        self.sparse: dict[Any, Tensor] = {}  #: module -> the tensor whose slices it is given, and reads as events
        self.forced = 0  #: how often numbers were needed before the forward ended
        self.forced_by: str | None = None  #: the user's line that first needed one

    def hold(self, state: Any, site: Site) -> None:
        """Let a layer's state know the site of its last call until the forward ends."""
        if state.site is None:
            self.holders.append(state)
        state.site = site

    def _let_go(self) -> None:
        for state in self.holders:
            state.site = None
        self.holders.clear()
        self.sites.clear()
        self.put_back.clear()
        self.given.clear()
        self.sparse.clear()
        self.lazy.clear()
        self._has_read()

    @property
    def was_worth_it(self) -> bool:
        """Whether neurons' calls ran together: where most run alone, recording costs more than it spares."""
        return 0 < 2 * self.runs <= self.ran

    def accepts(self) -> bool:
        """Whether a call made now may be recorded: torch is in the state that recorded calls will run under. Inside
        a checkpoint or a custom autograd function it is not, and what they see must be computed there."""
        return _grad_enabled() is self.grad_mode and not _functorch_active() and _hooks(True) == self.hooks

    @staticmethod
    def mode() -> bool:
        """What of torch's state a recorded call runs under."""
        return torch.is_grad_enabled()

    def watch(self, tensor: Tensor) -> None:
        """Remember that a recorded call will read this tensor, or these events, of the caller's."""
        self.watched.append((tensor, _version(tensor)))

    def _check_unchanged(self, sites: Iterable[Site]) -> None:
        watched, self.watched = self.watched, []
        changed = [tensor for tensor, version in watched if _version(tensor) != version]
        for site in sites:
            changed += [tensor for tensor, numbers, _ in site.reads if _numbers(tensor) != numbers]
        if changed:
            raise RuntimeError(
                f"time fusion: a tensor of shape {list(changed[0].shape)} was changed in place after a recorded call "
                "read it and before that call ran. Change it before the loop or after its results are used, or "
                "run step by step: sparse_backend.enable(net, fuse_time=False)"
            )

    def will_write(self, site: Site, *written: Tensor) -> None:
        """Calls of this site write these tensors; all calls that do run in their order."""
        self.sites[tuple(map(id, written))] = site

    def writer_of(self, *written: Tensor | None) -> Site | None:
        return self.sites.get(tuple(map(id, written)))

    def has_queued_writes(self, *written: Tensor | None) -> bool:
        site = self.writer_of(*written)
        return site is not None and bool(site.queue)

    def input_ref(self, x: Any) -> Any:
        """How a node remembers an input: a placeholder of this recording by its node, anything else as it is."""
        if type(x) is Placeholder:
            if x._dense is not None:  # whoever has looked at it may hold a view
                self.watch(x._dense)
            if x._dense_only or x.spec.recording is not self:
                return x.to_dense()
            return use(x.ref)
        self._will_read(x)
        return x

    def tensor_ref(self, site: Site, tensor: Tensor) -> Tensor:
        """How a node remembers a dense input: as it is, or its copy where the caller refills one buffer at every step.
        That shows in the second call, so the first one's is copied too; of a slice the whole is there from the start.
        """
        if site.copied is None:
            refilled = tensor._base is None
        else:
            before, version, copy = site.copied
            refilled = tensor.data_ptr() == before.data_ptr()
            if refilled and tensor._version == version and _is_same(tensor, before):
                return copy
        if not refilled:
            self.watch(tensor)
            return tensor
        copy = tensor.clone()
        site.copied = tensor, tensor._version, copy
        return copy

    def _will_read(self, x: Any) -> None:
        """If these are spikes or a current of the caller's, a write to them makes recorded calls run before."""
        if not isinstance(x, TensorLike):
            return
        for read in (x, x.whole) if type(x) is EventTensor else (x,):
            if self not in read._readers:
                read._readers = (*read._readers, self)
                self.reading.append(read)
            if read._dense is not None:  # whoever has looked at it may hold a view
                self.watch(x if type(x) is EventTensor else read._dense)

    def state_ref(self, x: Any) -> Any:
        """How a node remembers a state. The first call to take a state continues its layer's run; if it cannot,
        that state is the last of its run, which every run keeps."""
        if type(x) is Placeholder:
            return x.to_dense() if x._dense_only or x.spec.recording is not self else take(x.ref)
        self._will_read(x)
        return x

    def flush(self, forced: bool = False) -> None:
        """Run everything recorded so far."""
        if forced:
            self.given.clear()  # whoever has numbers may go backwards through them, and their graph is spent
        waiting = self._released()
        if not self.pending:
            self._write(waiting)
            return
        if forced:
            self.forced += 1
            self.forced_by = self.forced_by or _users_line()
        pending, self.pending = self.pending, []
        self._has_read()
        sites = {id(node.site): node.site for node in pending}.values()
        try:
            self._check_unchanged(sites)
            self.chunk = min(site.most for site in sites)
            for site in sites:
                if site.most < sys.maxsize:
                    site.most = self.chunk  # one for all: what a run made is then taken whole by the next
            with paused(), undisturbed(self.hooks, self.inference):
                for node in pending:
                    if node.run is None:
                        self._run(node.site)
            self._write(waiting)
        finally:
            for site in sites:
                site.forget()

    def _released(self) -> list[Any]:
        """The tensors that wait for writes, plain again: what reads them now was recorded before."""
        waiting, self.waiting = self.waiting, []
        for buffer in waiting:
            buffer.release()
        return waiting

    def _write(self, waiting: list[Any]) -> None:
        """Make the writes that these have waited for."""
        if waiting:
            with paused(), undisturbed(self.hooks, self.inference), torch.set_grad_enabled(self.grad_mode):
                for buffer in waiting:
                    buffer.write()

    def compute_lazy(self) -> None:
        """Compute what has run and waits for somebody to look at it, while the weights are what they were."""
        for weak in self.lazy:
            current = weak()
            if current is not None:
                current.to_dense()
        self.lazy.clear()

    def _has_read(self) -> None:
        for read in self.reading:
            read._readers = tuple([reader for reader in read._readers if reader is not self])
        self.reading.clear()

    def _run(self, site: Site) -> None:
        """Run the next call of a site, whose inputs have all run, and what later ones can run with it."""
        site.gathering = True
        nodes = self._ready(site)
        site.gathering = False
        site.place += len(nodes)
        with torch.set_grad_enabled(site.mode), _requiring_grad(site.reads) as site.switched:
            if autocasting.is_now(site.autocast):
                site.execute(nodes)
            else:
                with autocasting.restored(site.autocast):
                    site.execute(nodes)
        for node in nodes:
            node.inputs = node.states = ()  # whoever keeps one output keeps no others
        if site.is_neuron:
            self.ran, self.runs = self.ran + len(nodes), self.runs + 1
            self.longest = max(self.longest, len(nodes))

    def _ready(self, site: Site) -> list[Node]:
        """The next call of a site, and the later ones that need nothing but what has run and their own past."""
        queue = site.queue
        nodes = [queue[site.place]]
        left = len(queue) - site.place
        size = math.ceil(left / math.ceil(left / site.most))  # runs of one length, not a short one at the end
        for later in itertools.islice(queue, site.place + 1, site.place + size):
            before = nodes[-1]
            for state, slot in zip(later.states, site.state_slots, strict=True):
                if type(state) is not tuple or state[0] is not before or state[1] != slot:
                    return nodes
            self.meets_itself = False
            for ref in later.inputs:
                if type(ref) is tuple and ref[0].run is None and not self._pull(ref[0]):
                    self.in_order |= site.is_neuron and len(nodes) == 1 and self.meets_itself
                    return nodes
            nodes.append(later)
        return nodes

    def _pull(self, node: Node) -> bool:
        """Run a call before its turn, if nothing it needs stands in the way."""
        site = node.site
        waits = not site.pulled or (site.is_neuron and self.chunk < sys.maxsize)  # what others read must stay in cache
        if waits or site.gathering or site.queue[site.place] is not node or self.pulling >= _DEEPEST:
            self.meets_itself |= site.gathering
            return False
        self.pulling += 1
        try:
            for ref in (*node.inputs, *node.states):
                if type(ref) is tuple and ref[0].run is None and not self._pull(ref[0]):
                    return False
            self._run(site)
        finally:
            self.pulling -= 1
        return True

    def finish(self) -> None:
        """Run what is left, and give every module its state as a tensor."""
        try:
            self.flush()
        except BaseException:
            self.abandon()
            raise
        self.calls = max((site.called for site in self.sites.values()), default=0)
        for put_back in self.put_back.values():
            put_back()
        self._let_go()

    def settle(self, module: Any) -> None:
        """A module is about to run now: give it its state as a tensor."""
        if module in self.put_back:
            self.flush(forced=True)
            self.put_back.pop(module)()

    def abandon(self) -> None:
        """The forward raised: drop what was recorded. Modules keep the states of the steps that had run, or start
        afresh as after a reset."""
        self.pending.clear()
        self.watched.clear()
        self._released()
        for site in self.sites.values():
            site.forget()
        for put_back in self.put_back.values():
            put_back()
        self._let_go()


def _is_same(tensor: Tensor, before: Tensor) -> bool:
    """Whether two tensors of one shape that begin at the same place are the same numbers with the same gradient."""
    learns = tensor.requires_grad or before.requires_grad
    return tensor is before or (not learns and tensor.stride() == before.stride())


def is_again(tensor: Any, before: Any) -> bool:
    """Whether this is what came before, or one more view of it: `x.flatten(1)` of a static image in every step."""
    if tensor is before:
        return True
    if type(tensor) is not Tensor or type(before) is not Tensor or tensor._base is None:
        return False
    return (
        tensor._base is before._base
        and tensor.data_ptr() == before.data_ptr()
        and tensor.shape == before.shape
        and tensor.dtype is before.dtype
        and _is_same(tensor, before)
    )


def is_watchable(tensor: Tensor) -> bool:
    """Whether a write to a tensor of the caller's shows: numpy's memory is written to without a trace."""
    return tensor.layout is torch.strided and not tensor.is_inference() and tensor.untyped_storage().resizable()


def owns_memory(tensor: Tensor) -> bool:
    """Whether no other tensor, nor numpy, sees a strided tensor's memory."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) <= 2 and storage.resizable()  # 2: this one and the tensor's


def _version(tensor: Tensor) -> int:
    if type(tensor) is EventTensor:
        return 0 if tensor.is_events else 1
    return 0 if tensor.is_inference() else tensor._version


def _numbers(tensor: Tensor) -> tuple[int, int]:
    """What tells a parameter's numbers from later ones: their version, and where they are, since `.data = …` puts
    others there, and sharded training frees them after a call."""
    return _version(tensor), tensor.data_ptr() if type(tensor) in (torch.nn.Parameter, Tensor) else 0


def _as_it_is(tensor: Tensor) -> tuple[Tensor, tuple[int, int], bool]:
    return tensor, _numbers(tensor), tensor.requires_grad


def use(ref: tuple[Node, int]) -> tuple[Node, int]:
    """Take an output as the input of a call."""
    ref[0].used |= 1 << ref[1]
    return ref


def take(ref: tuple[Node, int]) -> tuple[Node, int]:
    """Take an output as the state of the layer's next call."""
    node, slot = ref
    bit = 1 << slot
    if node.taken & bit:
        node.used |= bit
    node.taken |= bit
    return ref


@contextmanager
def _requiring_grad(reads: Sequence[tuple[Tensor, tuple[int, int], bool]]) -> Iterator[bool]:
    """Leaves require grad as they did when they were recorded; yields whether that takes a switch."""
    changed = [tensor for tensor, _, learned in reads if tensor.requires_grad is not learned and tensor.is_leaf]
    for tensor in changed:
        tensor.requires_grad_(not tensor.requires_grad)
    try:
        yield bool(changed)
    finally:
        for tensor in changed:
            tensor.requires_grad_(not tensor.requires_grad)


_here = threading.local()


def enclosing() -> Recording | None:
    """The recording of the forward pass this thread is in."""
    return getattr(_here, "recording", None)


def current() -> Recording | None:
    """The same, if calls made now may be recorded."""
    into = getattr(_here, "recording", None)
    return into if into is not None and into.accepts() else None


def _before_optimizer_step(*_: Any) -> None:
    """Recorded calls read weights as they are now."""
    into = enclosing()
    if into is not None:
        into.flush(forced=True)
        into.compute_lazy()


register_optimizer_step_pre_hook(_before_optimizer_step)


def _after_optimizer_step(optimizer: Any, *_: Any) -> None:
    """torch's fused optimizers write parameters without a new version, which is all that is asked on a GPU."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            increment_version([parameter for parameter in group["params"] if parameter.grad is not None])


register_optimizer_step_post_hook(_after_optimizer_step)


def is_recording() -> bool:
    """Whether a forward around this call records."""
    return enclosing() is not None


def is_recording_here() -> bool:
    """The same, but for a forward around the checkpoint that this call is in, which may run once more without it."""
    into = enclosing()
    return into is not None and _hooks(True) == into.hooks


@contextmanager
def recording(into: Recording | None) -> Iterator[None]:
    """Record into this recording, or into none.

    What is recorded dies when it has run. Python's garbage collector would carry it into its oldest generation
    meanwhile, whose collections take as long as a forward, so it waits.
    """
    before = getattr(_here, "recording", None)
    _here.recording = into
    collects = into is not None and gc.isenabled()
    if collects:
        gc.disable()
    try:
        yield
    finally:
        _here.recording = before
        if collects:
            gc.enable()


def paused() -> Any:
    """Compute instead of recording."""
    return recording(None)


def _users_line() -> str:
    """File and line of the innermost caller outside torch and this package."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(("sparse_backend.", "torch.")):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "unknown"
