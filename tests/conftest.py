"""Every test runs in 64-bit, with strict promotion of dtypes and ranks, on four CPU devices.

Compilation takes nearly all the time of the tests, so XLA leaves out most optimizations, but
where a test is marked `optimized`: there it compiles what users have.
"""

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 4)  # For meshes; all else runs on the first.

FEW = "jax_disable_most_optimizations"


@pytest.fixture(autouse=True)
def optimizations(request):
    few = request.node.get_closest_marker("optimized") is None
    if jax.config.values[FEW] != few:
        jax.config.update(FEW, few)
        jax.clear_caches()  # What they hold was compiled in the other way.
