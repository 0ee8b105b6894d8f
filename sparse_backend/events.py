"""EventTensor: spikes and active sets as events instead of dense tensors.

Layout. A tensor of shape [..., N] is R = prod(shape[:-1]) rows of N columns, rows in C order: for a sequence
[T, B, N] the row of step t and sample b is t * B + b. Of images, [T, B, C, H, W], the last three dimensions make one
row of C * H * W columns. The events are the nonzero entries in CSR form:

- `row_ptr` int32 [R + 1]: row r holds the entries row_ptr[r] .. row_ptr[r + 1] of `indices`. It need not begin at 0,
  so `x[t]` is a view;
- `indices` int32 [nnz]: columns, ascending within a row;
- `values` [nnz], or None where every event is 1.

Spikes of a layer of ours carry gradients through a *handle*: `handle` [n_active] is a 1-D differentiable tensor of
the spikes' values at the active entries `active_ptr`, `active_indices` (same CSR form), and its gradient is dL/dS
there. All other entries have gradient zero by definition of the method. Where every entry counts (a dense input that
requires grad, a layer in the dense regime) `handle` is the dense tensor [..., N] and `active_ptr` is None.
"""

from __future__ import annotations

import copyreg
import math
import operator
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_backend import _native
from sparse_backend.ops.events import call_events_sum, call_events_to_dense, events_from_dense, events_gather
from sparse_backend.tensorlike import TensorLike, implements, shaped, undisturbed

_INT32_MAX = 2**31 - 1
_OF_SPIKES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_OF_KERNELS = (torch.float32, torch.float64, torch.bool, torch.uint8)


class EventTensor(TensorLike):
    """A tensor stored as its nonzero entries; see the module's docstring for the layout.

    It may be used wherever a tensor is expected: anything that does not know it gets its dense form. Build one with
    `from_dense`, `from_coo`, `from_times` or `collate`.
    """

    __slots__ = (
        "_dense",
        "_dense_version",
        "_origin",
        "_steps",
        "_view_learns",
        "_view_of",
        "active_indices",
        "active_ptr",
        "columns",
        "dtype",
        "handle",
        "indices",
        "row_ptr",
        "shape",
        "values",
    )

    def __init__(
        self,
        shape: Sequence[int],
        row_ptr: Tensor,
        indices: Tensor,
        values: Tensor | None = None,
        *,
        handle: Tensor | None = None,
        active_ptr: Tensor | None = None,
        active_indices: Tensor | None = None,
        dtype: torch.dtype | None = None,
        columns: int | None = None,
        check: bool = True,
    ) -> None:
        """shape: [..., N]; columns: entries of a row where it is more than the last dimension; see the module's
        docstring for the rest.

        Raises ValueError if the parts do not fit together; `check=False` skips what costs a pass over the events.
        """
        self.shape = torch.Size(shape)
        self.columns = columns if columns is not None else self.shape[-1] if self.shape else 0
        self.row_ptr, self.indices, self.values = row_ptr, indices, values
        self.handle, self.active_ptr, self.active_indices = handle, active_ptr, active_indices
        source = values if values is not None else handle
        self.dtype = dtype or (source.dtype if source is not None else torch.get_default_dtype())
        self._dense: Tensor | None = None
        self._steps: list[EventTensor] | None = None
        self._origin: Any = None  # weak reference to the tensor this is a step of
        self._view_of: EventTensor | None = None  # whose memory the dense form is
        self._view_learns = True  # and its gradient too: it was not made under no_grad
        if check:
            self._check()
            self.row_ptr, self.indices = row_ptr.contiguous(), indices.contiguous()
            self.values = None if values is None else values.contiguous()

    def _check(self) -> None:
        if not self.shape:
            raise ValueError("EventTensor: expected a shape [..., N] of at least one dimension, got []")
        rows, columns = self.rows, self.columns
        if not _are_rows(self.shape, columns):
            raise ValueError(
                f"EventTensor: columns must be the size of the last dimensions of {list(self.shape)}, got {columns}"
            )
        pairs = [("row_ptr", self.row_ptr, "indices", self.indices)]
        if self.active_ptr is not None and self.active_indices is not None:
            pairs.append(("active_ptr", self.active_ptr, "active_indices", self.active_indices))
        for ptr_name, ptr, name, indices in pairs:
            for label, part in ((ptr_name, ptr), (name, indices)):
                if part.dtype != torch.int32 or part.dim() != 1:
                    raise ValueError(
                        f"EventTensor: {label} must be int32 of one dimension, got {part.dtype} {list(part.shape)}"
                    )
            if ptr.numel() != rows + 1:
                raise ValueError(
                    f"EventTensor: {ptr_name} must have {rows + 1} entries for shape {list(self.shape)}, "
                    f"got {ptr.numel()}"
                )
            first, last = int(ptr[0]), int(ptr[-1])
            if first < 0 or last > indices.numel() or bool((ptr[1:] < ptr[:-1]).any()):
                raise ValueError(
                    f"EventTensor: {ptr_name} must ascend within 0..{indices.numel()}, got {first}..{last}"
                )
            used = indices[first:last]
            if used.numel() and (int(used.min()) < 0 or int(used.max()) >= columns):
                raise ValueError(
                    f"EventTensor: {name} must lie in 0..{columns - 1}, got {int(used.min())}..{int(used.max())}"
                )
            starts = ptr[1:-1].long() - first
            breaks = torch.zeros(used.numel() + 1, dtype=torch.bool, device=used.device)
            breaks[starts] = True
            if used.numel() > 1 and bool(((used[1:] <= used[:-1]) & ~breaks[1:-1]).any()):
                raise ValueError(f"EventTensor: {name} must ascend within each row, without repeats")
        if self.values is not None and self.values.shape != self.indices.shape:
            raise ValueError(
                f"EventTensor: values must have shape {list(self.indices.shape)}, got {list(self.values.shape)}"
            )
        self._check_handle()

    def _check_handle(self) -> None:
        handle, ptr, indices = self.handle, self.active_ptr, self.active_indices
        if (ptr is None) != (indices is None):
            raise ValueError("EventTensor: active_ptr and active_indices must be given together")
        if ptr is not None and indices is not None and (int(ptr[0]) != 0 or int(ptr[-1]) != indices.numel()):
            raise ValueError(
                f"EventTensor: active_ptr must go from 0 to {indices.numel()}, the length of active_indices, "
                f"got {int(ptr[0])}..{int(ptr[-1])}"
            )
        if handle is None:
            return
        shape = self.shape if indices is None else indices.shape
        if handle.shape != shape:
            raise ValueError(f"EventTensor: handle must have shape {list(shape)}, got {list(handle.shape)}")

    # Building.

    @classmethod
    def from_dense(cls, dense: Tensor, row_dims: int = 1) -> EventTensor:
        """Events of a dense tensor [..., N] of any float dtype, bool or uint8, in one pass over it.

        row_dims: how many of the last dimensions make a row, 3 for images. A tensor that requires grad keeps receiving
        its whole gradient: it becomes the handle.
        A sparse tensor goes through `from_coo`. Raises TypeError for what is no tensor, ValueError for a tensor without
        dimensions, a wrong row_dims or more than 2**34 entries.
        """
        if not isinstance(dense, Tensor):
            raise TypeError(
                f"EventTensor.from_dense: expected a torch.Tensor, got {type(dense).__name__}. Use torch.as_tensor"
            )
        if isinstance(dense, TensorLike):
            if type(dense) is EventTensor and dense.is_events and dense.columns == dense.shape[-row_dims:].numel():
                return dense
            dense = dense.to_dense()
        if dense.layout != torch.strided:
            return cls.from_coo(dense)
        if dense.dim() == 0:
            raise ValueError("EventTensor.from_dense: expected a tensor [..., N], got one without dimensions")
        if not 0 < row_dims <= dense.dim():
            raise ValueError(f"EventTensor.from_dense: row_dims must lie in 1..{dense.dim()}, got {row_dims}")
        if dense.numel() > _INT32_MAX * 8:
            raise ValueError(f"EventTensor.from_dense: expected at most 2**34 entries, got {dense.numel()}")
        events = cls.if_sparse(dense, 1.0, row_dims)
        assert events is not None
        return events

    @classmethod
    def if_sparse(cls, dense: Tensor, max_density: float, row_dims: int = 1) -> EventTensor | None:
        """Events of a strided tensor [..., N], None where more than `max_density` of its entries are events."""
        _native.load()
        plain = dense.detach()
        if row_dims > 1:
            plain = plain.flatten(-row_dims)
        if plain.dtype not in _OF_KERNELS and not (plain.is_cuda and plain.dtype in _OF_SPIKES):
            # half precision, which float32 holds, or whole numbers
            plain = plain.to(torch.float32 if plain.is_floating_point() else torch.get_default_dtype())
        row_ptr, indices, values = events_from_dense(plain, max_density)
        if not row_ptr.numel():
            return None
        dtype = dense.dtype if dense.is_floating_point() else torch.get_default_dtype()
        return cls(
            dense.shape,
            row_ptr,
            indices,
            values.to(dtype) if values.numel() else None,
            handle=dense if dense.requires_grad else None,
            dtype=dtype,
            columns=plain.shape[-1],
            check=False,
        )

    @classmethod
    def from_coo(cls, sparse: Tensor, dtype: torch.dtype | None = None) -> EventTensor:
        """Events of a torch.sparse tensor (COO or CSR) of shape [..., N]; repeated entries are summed.

        dtype: that of the spikes, the tensor's own if None. Raises TypeError for what is no sparse tensor, ValueError
        for one with dense dimensions.
        """
        if not isinstance(sparse, Tensor) or sparse.layout == torch.strided:
            got = "a strided one" if isinstance(sparse, Tensor) else type(sparse).__name__
            raise TypeError(f"EventTensor.from_coo: expected a sparse tensor, got {got}. Use EventTensor.from_dense")
        if sparse.layout != torch.sparse_coo:
            sparse = sparse.to_sparse_coo()
        sparse = sparse.coalesce()
        if sparse.requires_grad:  # every entry counts
            return cls.from_dense(sparse.to_dense())
        if sparse.dense_dim():
            raise ValueError(f"EventTensor.from_coo: expected no dense dimensions, got {sparse.dense_dim()}")
        where, values = sparse.indices(), sparse.values()
        rows = torch.zeros(where.shape[1], dtype=torch.long, device=where.device)
        for size, index in zip(sparse.shape[:-1], where[:-1], strict=True):
            rows = rows * size + index
        if not values.is_floating_point():
            values = values.to(torch.get_default_dtype())
        return cls._from_sorted(sparse.shape, rows, where[-1], values, dtype)

    @classmethod
    def from_times(
        cls,
        times: Any,
        units: Any,
        steps: int,
        n_units: int,
        *,
        dt: float = 1.0,
        duplicates: str = "one",
        dtype: torch.dtype | None = None,
    ) -> EventTensor:
        """One recording, [T, N], from arrays of event times and units.

        times, units: [n_events], numbers and integers in any order; step = floor(time / dt). Events at or after
        `steps` are dropped. duplicates: several events in one step and unit count as "one" spike, or "sum".
        Raises TypeError for steps or n_units that are no integers, ValueError for negative ones, negative times, units
        outside 0..n_units-1, lengths that differ or a dt that is not a positive number.
        """
        for name, size in (("steps", steps), ("n_units", n_units)):
            if operator.index(size) < 0:
                raise ValueError(f"EventTensor.from_times: {name} must be at least 0, got {size}")
        if not 0 < dt < math.inf:
            raise ValueError(f"EventTensor.from_times: dt must be a positive number, got {dt}")
        times, units = torch.as_tensor(times), torch.as_tensor(units).long()
        if times.dtype in (torch.uint16, torch.uint32, torch.uint64):  # of which torch has few functions
            times = times.double()
        if times.shape != units.shape or times.dim() != 1:
            raise ValueError(
                f"EventTensor.from_times: times and units must be arrays of one length, got {list(times.shape)} "
                f"and {list(units.shape)}"
            )
        if duplicates not in ("one", "sum"):
            raise ValueError(f"EventTensor.from_times: duplicates must be 'one' or 'sum', got {duplicates!r}")
        if units.numel() and (int(units.min()) < 0 or int(units.max()) >= n_units):
            raise ValueError(
                f"EventTensor.from_times: units must lie in 0..{n_units - 1}, "
                f"got {int(units.min())}..{int(units.max())}"
            )
        if times.numel() and not bool((times >= 0).all()):
            raise ValueError(f"EventTensor.from_times: times must be at least 0, got {float(times.min())}")
        step = torch.div(times.double(), dt, rounding_mode="floor")  # integers above 2**24 need the double
        inside = step < steps
        flat, counts = torch.unique(step[inside].long() * n_units + units[inside], return_counts=True)
        values = counts.to(dtype or torch.get_default_dtype()) if duplicates == "sum" else None
        return cls._from_sorted(torch.Size((steps, n_units)), flat // n_units, flat % n_units, values, dtype)

    @classmethod
    def _from_sorted(
        cls, shape: torch.Size, rows: Tensor, columns: Tensor, values: Tensor | None, dtype: torch.dtype | None
    ) -> EventTensor:
        row_ptr = torch.zeros(shape[:-1].numel() + 1, dtype=torch.int32, device=rows.device)
        row_ptr[1:] = torch.bincount(rows, minlength=row_ptr.numel() - 1).cumsum(0)
        if values is not None and bool((values == 1).all()):
            dtype, values = dtype or values.dtype, None
        if values is not None and dtype is not None:
            values = values.to(dtype)
        return cls(shape, row_ptr, columns.to(torch.int32), values, dtype=dtype)

    @classmethod
    def collate(cls, samples: Sequence[Any]) -> EventTensor:
        """Samples [T, ...] of one shape, a row per step -> a batch [T, B, ...]; also `sparse_backend.collate` for a
        DataLoader."""
        if not samples:
            raise ValueError("EventTensor.collate: expected at least one sample, got none")
        tensors = [
            sample
            if type(sample) is EventTensor and sample.is_events
            else cls.from_dense(sample, max(sample.dim() - 1, 1))
            for sample in samples
        ]
        shape = tensors[0].shape
        for position, sample in enumerate(tensors):
            if sample.shape != shape or len(shape) < 2 or sample.rows != shape[0]:
                raise ValueError(
                    f"EventTensor.collate: samples must have one shape [T, N], a row per step, got {list(shape)} and "
                    f"{list(sample.shape)} of {sample.rows} rows at position {position}"
                )
        steps, columns = shape[0], shape[1:].numel()
        batch = len(tensors)
        rows, cols, values = [], [], []
        for b, sample in enumerate(tensors):
            begin, end = int(sample.row_ptr[0]), int(sample.row_ptr[-1])
            counts = (sample.row_ptr[1:] - sample.row_ptr[:-1]).long()
            rows.append(torch.repeat_interleave(torch.arange(steps, device=counts.device) * batch + b, counts))
            cols.append(sample.indices[begin:end])
            ones = torch.ones(end - begin, device=counts.device)
            values.append(ones if sample.values is None else sample.values[begin:end])
        row = torch.cat(rows)
        order = torch.sort(row, stable=True).indices
        weights = None if all(s.values is None for s in tensors) else torch.cat(values)[order]
        flat = cls._from_sorted(
            torch.Size((steps, batch, columns)), row[order], torch.cat(cols)[order], weights, tensors[0].dtype
        )
        return flat.reshaped(torch.Size((steps, batch, *shape[1:])))

    # Reading.

    @property
    def device(self) -> torch.device:
        return self.indices.device

    @property
    def rows(self) -> int:
        """R: how many rows there are."""
        return self.shape.numel() // self.columns if self.columns else self.shape[:-1].numel()

    @property
    def has_steps(self) -> bool:
        """Whether `x[t]` is several rows, as a step of [T, B, ...] is."""
        return len(self.shape) > 2 and _are_rows(self.shape[2:], self.columns)

    @property
    def learns(self) -> bool:  # type: ignore[override]
        if not self.is_events:
            return (
                self.to_dense().requires_grad if self._view_of is None else self._view_learns and self._view_of.learns
            )
        return self.handle is not None and self.handle.requires_grad

    @property
    def nnz(self) -> int:
        """How many events there are."""
        if not self.is_events:
            return int(torch.count_nonzero(self.to_dense()))
        return int(self.row_ptr[-1]) - int(self.row_ptr[0])

    @property
    def density(self) -> float:
        """Events over entries, 0..1; 0 for an empty tensor."""
        return self.nnz / self.numel() if self.numel() else 0.0

    @property
    def is_events(self) -> bool:
        """Whether the events still are the tensor: False once someone may have written to its dense form."""
        dense = self._dense
        if dense is not None and not self._dense_only and not dense.is_inference():
            self._dense_only = dense._version != self._dense_version  # written through a view of it
        return not self._dense_only and (self._view_of is None or self._view_of.is_events)

    def dense_from_now_on(self) -> Tensor:
        if self._view_of is not None:
            self._view_of.dense_from_now_on()
        return super().dense_from_now_on()

    def to_dense(self, *_: Any, **__: Any) -> Tensor:
        """The dense tensor [..., N]; made once, differentiable where the handle is, even for a reader under no_grad."""
        if self._dense is None or (self._dense.is_inference() and not torch.is_inference_mode_enabled()):
            learns = self.learns
            with torch.set_grad_enabled(learns or torch.is_grad_enabled()), undisturbed(inference=not learns):
                self._dense = self._make_dense()
            if not self._dense.is_inference():
                self._dense_version = self._dense._version
            for reader in self._readers:
                reader.watch(self)
        return self._dense

    def _make_dense(self) -> Tensor:
        if self._view_of is not None:
            whole = self._view_of.to_dense()
            with torch.set_grad_enabled(self._view_learns and torch.is_grad_enabled()):
                return whole.view(self.shape)
        if self.handle is not None and self.active_ptr is None:
            return self.handle
        _native.load()
        like = self.handle if self.handle is not None else self.row_ptr.new_empty(0, dtype=self.dtype)
        values = self.values
        if like.dtype not in _OF_KERNELS:
            like, values = like.float(), None if values is None else values.float()
        parts = (self.row_ptr, self.indices, values, self.active_ptr, self.active_indices)
        return shaped(call_events_to_dense(like, *parts, self.columns).to(self.dtype), self.shape)

    def step(self, t: int) -> EventTensor:
        """`x[t]`: the events of one index of the first dimension, a view. Raises IndexError outside it."""
        size = self.shape[0]
        if not -size <= t < size:
            raise IndexError(f"index {t} is out of bounds for dimension 0 with size {size}")
        if not self.is_events:
            return self._as_now().step(t)
        whole = self._view_of
        if whole is not None and whole.has_steps and whole.shape[0] == size and whole.columns == self.columns:
            view = whole.step(t).as_view(self.shape[1:])
            if view is not None:
                return view
        if self._steps is None:
            with torch.set_grad_enabled(self.learns or torch.is_grad_enabled()):  # its reader may be under no_grad
                self._steps = self._split()
            for part in self._steps:
                part._origin = weakref.ref(self)
        part = self._steps[t % size]
        return part.without_handle() if part.learns and not torch.is_grad_enabled() else part

    def _as_now(self) -> EventTensor:
        """The events of what its dense form has become."""
        row_dims = next(k for k in range(1, len(self.shape) + 1) if self.shape[-k:].numel() == self.columns)
        return EventTensor.from_dense(self.to_dense(), row_dims)

    @property
    def origin(self) -> EventTensor | None:
        """The tensor this, or what it is a view of, is `x[t]` of, while somebody holds it."""
        whole = self.whole
        return None if whole._origin is None else whole._origin()

    @property
    def whole(self) -> EventTensor:
        """The tensor this is a view of, or this one."""
        return self if self._view_of is None else self._view_of

    def steps_like(self, steps: Sequence[Any]) -> EventTensor | None:
        """`x[first:last]` of this tensor if these are those steps of it, each as `step` gave it; None if not."""
        mine = self._steps or []
        first = next((t for t, step in enumerate(mine) if step is steps[0]), 0)
        last = first + len(steps)
        if last > len(mine) or any(a is not b for a, b in zip(mine[first:last], steps, strict=True)):
            return None
        return self.some_steps(first, last)

    def some_steps(self, first: int, last: int) -> EventTensor:
        """`x[first:last]`, this one if that is all."""
        size = self.shape[0]
        if last - first == size:
            return self
        rows = self.rows // size
        handle, active_ptr, active_indices = self.handle, self.active_ptr, self.active_indices
        if handle is not None and active_ptr is not None and active_indices is not None:
            active_ptr = active_ptr[first * rows : last * rows + 1]
            begin, end = int(active_ptr[0]), int(active_ptr[-1])
            handle, active_indices, active_ptr = handle[begin:end], active_indices[begin:end], active_ptr - begin
        elif handle is not None:
            handle = handle[first:last]
        row_ptr = self.row_ptr[first * rows : last * rows + 1]
        shape = (last - first, *self.shape[1:])
        return self._with(shape, row_ptr, self.indices, self.values, handle, active_ptr, active_indices)

    @classmethod
    def stack(cls, steps: Sequence[EventTensor]) -> EventTensor:
        """At least one, of one shape [..., N], one after another along a new first dimension. Compact handles are
        joined and stay differentiable, dense ones are left out."""
        return cls._below_each_other(steps, (len(steps), *steps[0].shape))

    @classmethod
    def cat(cls, parts: Sequence[EventTensor]) -> EventTensor:
        """The same along the first dimension they have; the others must agree."""
        return cls._below_each_other(parts, (sum(part.shape[0] for part in parts), *parts[0].shape[1:]))

    @classmethod
    def _below_each_other(cls, steps: Sequence[EventTensor], shape: Sequence[int]) -> EventTensor:
        row_ptr, indices = _join([(step.row_ptr, step.indices) for step in steps])
        values = None
        if any(step.values is not None for step in steps):
            values = torch.cat([step._weights() for step in steps])
        handle = active_ptr = active_indices = None
        handles = [step.handle if step.learns and step.active_ptr is not None else None for step in steps]
        if any(part is not None for part in handles):
            active: list[Any] = [
                (torch.zeros_like(step.row_ptr), indices[:0])
                if part is None
                else (step.active_ptr, step.active_indices)
                for step, part in zip(steps, handles, strict=True)
            ]
            active_ptr, active_indices = _join(active)
            handle = torch.cat([part for part in handles if part is not None])
        return steps[0]._with(shape, row_ptr, indices, values, handle, active_ptr, active_indices)

    def reshaped(self, shape: torch.Size) -> EventTensor:
        """The same rows under another shape, as a tensor of its own; `as_view` shares its dense form with this one."""
        result = self._map(lambda part: part)
        result.shape = shape
        if result.handle is not None and result.active_ptr is None:
            result.handle = result.handle.view(shape)
        return result

    def as_view(self, shape: torch.Size) -> EventTensor | None:
        """`x.view(shape)`, this one where that is its shape; None where rows would be cut."""
        if shape == self.shape:
            return self
        if not _are_rows(shape, self.columns) or not self.is_events:
            return None
        if self.handle is not None and self.active_ptr is None and not self.handle.is_contiguous():
            return None
        learns = torch.is_grad_enabled() or not self.learns
        view = self.reshaped(shape) if learns else self.without_handle().reshaped(shape)
        view._view_of, view._view_learns = self.whole, learns and self._view_learns
        return view

    def masked(self, mask: Tensor) -> EventTensor:
        """`self * mask`, where the mask is finite and has no gradient. mask: of this shape and dtype"""
        flat = mask.detach().reshape(self.rows, self.columns)
        row_ptr, indices, values, kept = _kept(flat, self.row_ptr, self.indices)
        if self.values is not None:
            values = values * self._weights()[kept]
        handle, active_ptr, active_indices = self.handle, self.active_ptr, self.active_indices
        if handle is not None and active_ptr is not None and active_indices is not None:
            active_ptr, active_indices, factors, kept = _kept(flat, active_ptr, active_indices)
            handle = handle[kept] * factors
        elif handle is not None:
            handle = handle * mask
        return self._with(self.shape, row_ptr, indices, values, handle, active_ptr, active_indices)

    def _weights(self) -> Tensor:
        """What each event counts: [nnz]."""
        begin, end = int(self.row_ptr[0]), int(self.row_ptr[-1])
        if self.values is None:
            return torch.ones(end - begin, dtype=self.dtype, device=self.device)
        return self.values[begin:end]

    def _split(self) -> list[EventTensor]:
        size, shape = self.shape[0], self.shape[1:]
        rows = self.rows // size if size else shape[:-1].numel()
        handles: Sequence[Tensor | None] = [None] * size
        actives = [(None, None)] * size
        if self.handle is not None and self.active_ptr is None:
            handles = self.handle.unbind(0)
        elif self.handle is not None:
            assert self.active_ptr is not None and self.active_indices is not None
            bounds = self.active_ptr[::rows] if rows else self.active_ptr.new_zeros(size + 1)
            sizes = (bounds[1:] - bounds[:-1]).tolist()
            handles = self.handle.split(sizes)
            pointers = [self.active_ptr[t * rows : (t + 1) * rows + 1] for t in range(size)]
            parts = self.active_indices.split(sizes)
            actives = [(ptr - ptr[0], part) for ptr, part in zip(pointers, parts, strict=True)]
        row_ptrs = self.row_ptr.unfold(0, rows + 1, rows).unbind(0) if rows else [self.row_ptr] * size
        return [self._with(shape, row_ptrs[t], self.indices, self.values, handles[t], *actives[t]) for t in range(size)]

    def __getitem__(self, key: Any) -> Any:
        if type(key) is int and self.has_steps and self.is_events:
            return self.step(key)
        return self.to_dense()[key]

    def __iter__(self) -> Any:
        return (self[t] for t in range(len(self)))

    def _with(
        self,
        shape: Sequence[int],
        row_ptr: Tensor,
        indices: Tensor,
        values: Tensor | None,
        handle: Tensor | None = None,
        active_ptr: Tensor | None = None,
        active_indices: Tensor | None = None,
    ) -> EventTensor:
        """Other rows of as many columns and of this dtype."""
        return EventTensor(
            shape,
            row_ptr,
            indices,
            values,
            handle=handle,
            active_ptr=active_ptr,
            active_indices=active_indices,
            dtype=self.dtype,
            columns=self.columns,
            check=False,
        )

    def _map(self, function: Any) -> EventTensor:
        parts = (self.row_ptr, self.indices, self.values, self.handle, self.active_ptr, self.active_indices)
        row_ptr, indices, values, handle, active_ptr, active_indices = (
            None if part is None else function(part) for part in parts
        )
        return self._with(self.shape, row_ptr, indices, values, handle, active_ptr, active_indices)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As `Tensor.to`; a change of device keeps the events, a change of dtype converts values and handle."""
        options = dict(kwargs)
        copy = options.pop("copy", False)
        at = 2 if args and isinstance(args[0], (Tensor, torch.dtype)) else 3  # where `copy` stands among the arguments
        if len(args) > at:
            args, copy = args[:at], args[at]
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **options)
        if not self.is_events or memory_format not in (None, torch.preserve_format, torch.contiguous_format):
            return self.to_dense().to(*args, **options, copy=copy)
        result = self
        if device is not None and device != self.device:
            result = result._map(lambda part: part.to(device, non_blocking=non_blocking))
        if dtype is not None and dtype != self.dtype:
            if dtype not in _OF_SPIKES:
                return result.to_dense().to(dtype)
            result = result._map(lambda part: part.to(dtype) if part.is_floating_point() else part)
            result.dtype = dtype
        return result._map(torch.clone) if result is self and copy else result

    def cpu(self, memory_format: Any = None) -> Any:
        return self.to("cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False) -> Any:
        return self.to(torch.device("cuda") if device is None else device, non_blocking=non_blocking)

    def float(self, memory_format: Any = None) -> Any:
        return self.to(torch.float32)

    def double(self, memory_format: Any = None) -> Any:
        return self.to(torch.float64)

    def pin_memory(self, device: Any = None) -> EventTensor:
        """A copy whose parts lie in page-locked memory."""
        if not self.is_events:
            return self.to_dense().pin_memory()
        return self._map(lambda part: part.pin_memory())

    def is_pinned(self) -> bool:
        return self.indices.is_pinned()

    def record_stream(self, s: Any) -> None:
        """Say that a CUDA stream reads this, as `Tensor.record_stream` does, of every part of it."""
        for part in (self.row_ptr, self.indices, self.values, self.handle, self.active_ptr, self.active_indices):
            if part is not None:
                part.record_stream(s)
        if self._dense is not None:
            self._dense.record_stream(s)

    def detach(self) -> EventTensor:
        """The same events without their handle."""
        if not self.is_events or (self.learns and not torch.is_grad_enabled()):
            # Inside a custom function's forward, autograd records what C++ sees of the result: a real tensor.
            return self.to_dense().detach()
        return self.without_handle()

    def without_handle(self) -> EventTensor:
        """The same events, which nothing learns from."""
        if not self.is_events:
            return self._as_now().without_handle()
        return self._with(self.shape, self.row_ptr, self.indices, self.values)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not self.is_events:
            return self.to_dense().__reduce_ex__(protocol)
        parts = (self.shape, self.row_ptr, self.indices, self.values, self.dtype, self.columns)
        return _rebuild, parts

    def __deepcopy__(self, memo: Any) -> Any:
        if self.learns or not self.is_events:
            return self.to_dense().__deepcopy__(memo)  # torch's own answer for a tensor inside a graph
        return self._map(torch.clone)

    def __repr__(self) -> str:
        if not self.is_events:
            return repr(self.to_dense())
        grad = ", requires_grad=True" if self.learns else ""
        return (
            f"EventTensor(shape={list(self.shape)}, events={self.nnz}, density={100 * self.density:.3g} %, "
            f"dtype={self.dtype}, device='{self.device}'{grad})"
        )


def _are_rows(shape: Sequence[int], columns: int) -> bool:
    """Whether a tensor of this shape is rows of so many columns, each made of whole dimensions."""
    size = 1
    for dim in reversed(shape):
        size *= dim
        if size == columns:
            return True
    return False


def _kept(mask: Tensor, row_ptr: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The entries where the mask is not zero: row pointers, indices, the mask there, and which of all they are."""
    begin, end = int(row_ptr[0]), int(row_ptr[-1])
    row_ptr, indices = row_ptr - begin, indices[begin:end]
    values = events_gather(mask, row_ptr, indices)
    kept = values.nonzero().squeeze(1)
    before = torch.zeros(indices.shape[0] + 1, dtype=torch.int32, device=indices.device)
    torch.cumsum(values != 0, 0, dtype=torch.int32, out=before[1:])
    return before[row_ptr], indices[kept], values[kept], kept


def _join(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """CSR structures of as many columns, row pointers and indices, one below the other."""
    pointers, indices, offset = [parts[0][0][:1] * 0], [], 0
    for row_ptr, columns in parts:
        begin, end = int(row_ptr[0]), int(row_ptr[-1])
        pointers.append(row_ptr[1:] + (offset - begin))
        indices.append(columns[begin:end])
        offset += end - begin
    return torch.cat(pointers), torch.cat(indices)


def _rebuild(
    shape: torch.Size,
    row_ptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    dtype: torch.dtype,
    columns: int | None = None,
) -> EventTensor:
    return EventTensor(shape, row_ptr, indices, values, dtype=dtype, columns=columns, check=False)


copyreg.pickle(EventTensor, lambda events: events.__reduce_ex__(2))
torch.serialization.add_safe_globals([_rebuild])


def collate(batch: Sequence[Any]) -> Any:
    """`collate_fn` of a DataLoader whose samples are EventTensors [T, ...], alone or in tuples, lists or dicts with
    anything else: events become one EventTensor [T, B, N], everything else goes through torch's default.

    Raises ValueError for an empty batch and for events of different shapes.
    """
    from torch.utils.data import default_collate

    if not batch:
        raise ValueError("collate: expected at least one sample, got none")
    first = batch[0]
    if type(first) is EventTensor:
        return EventTensor.collate(batch)
    if isinstance(first, dict):
        return type(first)((key, collate([sample[key] for sample in batch])) for key in first)
    if isinstance(first, (tuple, list)):
        columns = [collate(column) for column in zip(*batch, strict=True)]
        return type(first)(*columns) if hasattr(first, "_fields") else type(first)(columns)
    return default_collate(list(batch))


@implements(torch.sum, torch.Tensor.sum)
def _sum(input: Any, dim: Any = None, keepdim: bool = False, *, axis: Any = None, dtype: Any = None, **more: Any):
    """The sum over the first dimension, the steps: straight from the events."""
    if type(input) is not EventTensor or not input.is_events or (input.active_ptr is None and input.handle is not None):
        return NotImplemented
    dim = axis if dim is None else dim
    dtype = input.dtype if dtype is None else dtype
    if dim not in (0, (0,), [0]) or keepdim or dtype not in _OF_SPIKES or more:
        return NotImplemented
    if not input.numel() or not _are_rows(input.shape[1:], input.columns):
        return NotImplemented
    _native.load()
    like = input.handle if input.handle is not None else input.row_ptr.new_empty(0, dtype=input.dtype)
    values = input.values
    of_sum = dtype if dtype in _OF_KERNELS else torch.float32
    like, values = like.to(of_sum), None if values is None else values.to(of_sum)
    parts = (input.row_ptr, input.indices, values, input.active_ptr, input.active_indices)
    flat = call_events_sum(like, *parts, input.columns, input.shape[0])
    return flat.view(input.shape[1:]).to(dtype)


def masked(x: Any, mask: Tensor) -> Any:
    """`x * mask` of a mask that dropout has drawn: events of events, on a CPU, where nobody waits for the counts."""
    return x.masked(mask) if type(x) is EventTensor and x.is_events and x.device.type == "cpu" else x * mask


def _implement_dropout(function: Any) -> None:
    @implements(function)
    def dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        """What nothing is dropped from, in evaluation, is the same object, as torch has it; spikes stay events."""
        if not isinstance(x, TensorLike) or not 0 <= p <= 1:
            return NotImplemented
        if not training or p == 0:
            return x
        if type(x) is not EventTensor or not x.is_events or p == 1 or inplace or not x.numel():
            return NotImplemented
        return masked(x, function(torch.ones(x.shape, dtype=x.dtype, device=x.device), p, True))


for _dropout in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d):
    _implement_dropout(_dropout)


@implements(torch.Tensor.to_dense)
def _to_dense(x: EventTensor, *_: Any, **__: Any) -> Tensor:
    return x.to_dense()
