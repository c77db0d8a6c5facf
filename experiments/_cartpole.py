"""The cart and pole: a pole to be balanced on a cart, by pushing the cart left or right.

A pure function of the state, as the task `CartPole-v1` states it: forces of 10 N, explicit
steps of 0.02 s, the end at 12 degrees or at 2.4 m, at most 500 steps, each worth 1.

With mass M of both, mass m and half-length l of the pole, and gravity g, the motion without
friction satisfies (Florian, 2007, Correct equations for the dynamics of the cart-pole system):

    M x'' + m l (a'' cos a - a'^2 sin a) = F,    x'' cos a + 4/3 l a'' = g sin a.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["MAX_STEPS", "NUM_ACTIONS", "State", "accelerations", "reset", "restart", "step"]

GRAVITY = 9.8  # m / s^2
POLE_MASS = 0.1  # kg
TOTAL_MASS = 1.1  # kg, with the cart
HALF_LENGTH = 0.5  # m, of the pole
FORCE = 10.0  # N
TIME_STEP = 0.02  # s
MAX_POSITION = 2.4  # m
MAX_ANGLE = 12 * 2 * math.pi / 360
MAX_STEPS = 500
NUM_ACTIONS = 2


class State(NamedTuple):
    """One cart, or many along leading axes."""

    motion: Array  # [..., 4]: position, velocity, angle from upright, angular velocity
    time: Array  # [...], int32, steps since the start


def reset(key: Array, shape: tuple[int, ...] = ()) -> State:
    """Starts nearly upright and at rest, each number within 0.05 of 0."""
    motion = jax.random.uniform(key, (*shape, 4), minval=-0.05, maxval=0.05)
    return State(motion, jnp.zeros(shape, jnp.int32))


def step(state: State, action: Array) -> tuple[State, Array, Array]:
    """Pushes left (0) or right (1); the new state, and whether it fell, or time is over."""
    position, velocity, angle, spin = jnp.moveaxis(state.motion, -1, 0)
    force = jnp.where(action == 1, FORCE, -FORCE).astype(position.dtype)
    acceleration, spin_up = accelerations(angle, spin, force)
    rates = jnp.stack([velocity, acceleration, spin, spin_up], axis=-1)
    motion = state.motion + TIME_STEP * rates
    time = state.time + 1
    position, _, angle, _ = jnp.moveaxis(motion, -1, 0)
    terminated = (jnp.abs(position) > MAX_POSITION) | (jnp.abs(angle) > MAX_ANGLE)
    return State(motion, time), terminated, time >= MAX_STEPS


def restart(key: Array, state: State, done: Array) -> State:
    """The state, with a new start where an episode is over."""
    fresh = reset(key, done.shape)
    motion = jnp.where(done[..., None], fresh.motion, state.motion)
    return State(motion, jnp.where(done, fresh.time, state.time))


def accelerations(angle: Array, spin: Array, force: Array) -> tuple[Array, Array]:
    """Those of the cart and of the angle: the equations above, solved for them."""
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    moment = POLE_MASS * HALF_LENGTH
    push = (force + moment * spin**2 * sine) / TOTAL_MASS
    inertia = HALF_LENGTH * (4 / 3 - POLE_MASS * cosine**2 / TOTAL_MASS)
    spin_up = (GRAVITY * sine - cosine * push) / inertia
    return push - moment * spin_up * cosine / TOTAL_MASS, spin_up
