"""Every test runs in 64-bit, with strict promotion of dtypes and ranks, on eight CPU devices.

Compilation takes most of the time of the tests, so XLA leaves out most optimizations. A test
that is marked `optimized` compiles what users have.

Linux allows a process 65530 pieces of mapped memory, and XLA crashes where it needs one more. A
compiled program takes tens of them, so the programs of every fifty tests are forgotten.
"""

import itertools

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)  # For meshes; all else runs on the first.

FEW = "jax_disable_most_optimizations"
TESTS = itertools.count(1)


@pytest.fixture
def on_cpu():
    """For plans and programs of XLA's CPU backend, whatever other devices there are."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture(autouse=True)
def optimizations(request):
    few = request.node.get_closest_marker("optimized") is None
    if jax.config.values[FEW] != few:
        jax.config.update(FEW, few)
        jax.clear_caches()  # Their programs were compiled the other way.
    elif next(TESTS) % 50 == 0:
        jax.clear_caches()
