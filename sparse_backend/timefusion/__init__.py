"""Time fusion: a per-step Python loop, run layer by layer as sequences, with the results of the step order.

While an enabled module's forward runs, its neurons and linear layers do not compute: they add a `Node` to a
`Recording` and hand back a `Placeholder`. When somebody needs a number, everything recorded runs: the scheduler takes
the earliest node left, and with it as many later calls of the same layer as have their inputs ready, as one sequence.
Where a later layer feeds back into an earlier one, that is one step at a time, in step order: no pattern of user code
is recognised, only what depends on what.

- `forward.py`   an enabled module's forward, recorded; `fuse_time` for a loop outside it
- `recorder.py`  placeholders, nodes, the recording of one forward, the scheduler
- `sites.py`     what a run of calls of one layer does: linear, neuron, running sum, any other function
- `functions.py` torch functions on placeholders: recorded, or computed on values
- `buffers.py`   tensors of the caller's that a loop fills with `out[t] = spk`
"""
