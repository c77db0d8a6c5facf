"""What XLA prints while it compiles: nothing, because users see each line.

Every case is compiled in a process of its own, whose stderr is read.
"""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# XLA once printed that its simplifier was likely stuck in a circular loop here.
MANY_STEPS = """
import jax, jax.numpy as jnp, softjax as sj

steps, n = 200000, 5
logits = jax.ShapeDtypeStruct((steps, n), jnp.float32)
actions = jax.ShapeDtypeStruct((steps,), jnp.int32)
advantages = jax.ShapeDtypeStruct((steps,), jnp.float32)
legal = jax.ShapeDtypeStruct((steps, n), jnp.bool_)
loss = lambda z, a, b, w: sj.policy_gradient_loss(z, a, b, where=w)
jax.jit(jax.vmap(jax.grad(loss))).lower(logits, actions, advantages, legal).compile()
print("compiled")
"""

CATALOGUE = """
import jax, jax.numpy as jnp
from tests.catalogue import CATALOGUE

for entry in CATALOGUE:
    floats, others = entry.arguments(dtype="float32")
    places = tuple(range(len(floats)))

    def total(*args):
        value = entry.call(*args)
        return jnp.sum(jnp.where(jnp.isfinite(value), value, 0))

    jax.jit(jax.value_and_grad(total, places)).lower(*floats, *others).compile()
print("compiled")
"""


def complaints(stderr):
    """Lines at the level of errors, but for those that only say that the machine is slow."""
    lines = re.findall(r"^[EF]\d{4} .*$", stderr, flags=re.M)
    return [line for line in lines if "slow_operation_alarm" not in line]


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(MANY_STEPS, id="many steps"),
        pytest.param(CATALOGUE, id="catalogue", marks=pytest.mark.slow),
    ],
)
def test_xla_prints_no_errors(program):
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.stdout == "compiled\n", run.stderr
    assert complaints(run.stderr) == []


def test_an_error_would_be_seen():
    stuck = (
        "E1128 13:48:28.797987 13742 algebraic_simplifier.cc:1] Algebraic simplifier is likely"
        " stuck in a circular simplification loop"
    )
    slow = "E1128 13:48:28.797987 13742 slow_operation_alarm.cc:73] Constant folding is slow"
    assert complaints(f"warning\n{slow}\n{stuck}\n") == [stuck]
