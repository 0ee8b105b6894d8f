"""Neuron models as the engine sees them: a few coefficients and what happens at a spike.

Every model here is linear between spikes, so its adjoint only decays between events. An adapter fills one of these
from a framework's module; `execute.py` runs it; the ops named here hold the arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sparse_backend.ops.leaky import NONE, SUBTRACT, ZERO
from sparse_backend.ops.lif import VALUE

RESETS = {"subtract": SUBTRACT, "zero": ZERO, "none": NONE}


class Leaky(NamedTuple):
    """V[t] = beta V[t-1] + I[t], reset by a past spike; S[t] = H(V[t] - threshold). snnTorch's `Leaky`."""

    beta: Tensor  #: [] or [N], decay per step, already within [0, 1]
    threshold: Tensor  #: [] or [N]
    reset: int = SUBTRACT  #: SUBTRACT, ZERO or NONE
    reset_delay: bool = True  #: False: a second reset in the step of the spike, through which gradients flow
    graded: Tensor | None = None  #: [], what a spike is worth, where it is not 1


LIF_RESETS = {"value": VALUE, "subtract": SUBTRACT, "none": NONE}


class LIF(NamedTuple):
    """Membrane v and synaptic current i; S[t] = H(u[t] - threshold). Norse's LIF and, without i, its LIFBox.

    inflow = i + I;  u = v + mem_gain ((leak - v) + inflow);  i = syn_decay inflow;  v = u after the reset.
    """

    mem_gain: Tensor  #: [] or [N], as are all; the time step over the membrane's time constant
    syn_decay: Tensor | None  #: decay of i per step; None: no synaptic current
    leak: Tensor | None  #: None: nothing leaks, u = v + mem_gain inflow, Norse's IAF
    threshold: Tensor
    reset_to: Tensor  #: read by VALUE alone
    reset: int = VALUE  #: VALUE (v = reset_to), SUBTRACT (v = u - threshold) or NONE; of discrete ones ZERO too
    detached: bool = False  #: no gradient flows through the spike in the reset
    discrete: bool = False  #: other equations, and another meaning of mem_gain, reset and i: see `discrete`


def discrete(beta: Tensor, alpha: Tensor | None, threshold: Tensor, reset: int) -> LIF:
    """snnTorch's neurons with a synaptic current, or with recurrent weights: `Synaptic`, `RLeaky`, `RSynaptic`.

    i[t] = alpha i[t-1] + I[t];  V[t] = beta V[t-1] + i[t], reset by a past spike;  S[t] = H(V[t] - threshold).
    beta, alpha, threshold: [] or [N], beta and alpha within [0, 1]; alpha None: no synaptic current, i[t] = I[t].
    reset: SUBTRACT, ZERO (all of V[t]) or NONE.
    """
    return LIF(beta, alpha, None, threshold, threshold.detach(), reset, True, True)


class LI(NamedTuple):
    """The same without spikes: a leaky integrator. Norse's LI and, without i, its LIBox."""

    mem_gain: Tensor  #: [] or [N], as are all
    syn_decay: Tensor | None
    leak: Tensor | None
