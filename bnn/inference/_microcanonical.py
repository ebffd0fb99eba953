"""Microcanonical dynamics of many chains in lockstep: the loops over their coordinates.

    dz = scale u sqrt(d) dt,   du = -(1 - u u') scale grad U sqrt(d) / (d - 1) dt,   |u| = 1

A time step is a kick (u along the gradient, solved exactly), a drift of z and a kick. Every unit of
time z moves by one scale in the root mean square, so step sizes compare with those of Hamiltonian
Monte Carlo. The heat of a kick, minus the change of log volume that it makes, plays the part of the
kinetic energy: U + heat changes only by the error of the integrator.
"""

import math

import numpy as np

from bnn.inference._trajectory import _fill_normal as fill_normal
from bnn.inference._trajectory import _jit as jit
from bnn.inference._trajectory import _uniform as uniform

Array = np.ndarray

DIVERGENCE = 1000.0  # energy error beyond which a trajectory has left the level set (Stan)


@jit
def redirect(random, u):
    """Draws each chain's direction afresh, uniform on the sphere."""
    for c in range(len(u)):
        fill_normal(random[c], u[c])
        _normalise(u[c])


@jit
def _normalise(u):
    total = 0.0
    for i in range(len(u)):
        total += u[i] * u[i]
    factor = 1.0 / math.sqrt(total)
    for i in range(len(u)):
        u[i] *= factor


@jit
def turn(random, u, amount, work):
    """Turns each direction by noise of length `amount` in the root mean square.

    Args:
        random: (chain, 4) xoshiro256++.
        u: (chain, size) unit vectors, changed in place.
        amount: sqrt(exp(2 t / L) - 1), t the time since the last turn, L that of decoherence.
        work: (size,) scratch.
    """
    each = amount / math.sqrt(u.shape[1])
    for c in range(len(u)):
        fill_normal(random[c], work)
        for i in range(u.shape[1]):
            u[c, i] += each * work[i]
        _normalise(u[c])


@jit
def kick(u, gradient, scale, time, heat):
    """Directions bent down the gradient for some time, and the heat that this sets free.

    Args:
        u: (chain, size) unit vectors, changed in place.
        gradient: of the potential, (chain, size).
        scale: (size,).
        time: of the kick.
        heat: (chain,), added to; infinite where the gradient is not finite.
    """
    chains, size = u.shape
    for c in range(chains):
        square, along = 0.0, 0.0
        for i in range(size):
            slope = scale[i] * gradient[c, i]
            square += slope * slope
            along -= slope * u[c, i]
        if square == 0.0:
            continue
        if not square < 1e300:
            heat[c] = np.inf
            continue
        length = math.sqrt(square)
        along = min(max(along / length, -1.0), 1.0)
        # cosh and sinh of `arc`, both times exp(-arc), which cannot overflow
        arc = time * math.sqrt(size) * length / (size - 1)
        shrink = math.exp(-arc)
        cosh, sinh = 0.5 * (1.0 + shrink * shrink), 0.5 * (1.0 - shrink * shrink)
        stretch = cosh + along * sinh
        if stretch < 1e-300:
            heat[c] = np.inf
            continue
        heat[c] += (size - 1) * (arc + math.log(stretch))
        keep = shrink / stretch
        bend = (sinh + along * (cosh - shrink)) / (stretch * length)
        for i in range(size):
            u[c, i] = keep * u[c, i] - bend * scale[i] * gradient[c, i]
        _normalise(u[c])


@jit
def drift(z, u, scale, time):
    """Positions moved along their directions for some time, in place."""
    speed = time * math.sqrt(u.shape[1])
    for c in range(len(u)):
        for i in range(u.shape[1]):
            z[c, i] += speed * scale[i] * u[c, i]


@jit
def errors(potential, start, heat, out):
    """Energy error of each chain's stretch; infinite where it is not finite."""
    for c in range(len(out)):
        error = potential[c] - start[c] + heat[c]
        out[c] = error if error < 1e30 else np.inf


@jit
def decide(random, error, rate, taken):
    """Metropolis: takes a proposal with probability min(1, exp(-error))."""
    for c in range(len(error)):
        rate[c] = math.exp(-max(error[c], 0.0))
        taken[c] = uniform(random[c]) < rate[c]
