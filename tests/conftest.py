"""Every test runs in 64-bit, with strict promotion of dtypes and ranks, on eight CPU devices.

Compilation takes most of the time of the tests, so XLA leaves out most optimizations, and
takes the faster of its two emitters of code. A test that is marked `optimized` compiles what
users have.
"""

import functools

import jax
import pytest
from jax._src import compiler

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)  # For meshes; all else runs on the first.

FEW = "jax_disable_most_optimizations"


def is_known(option, value):
    try:
        jax.jit(lambda x: x, compiler_options={option: value})(0.0)
    except jax.errors.JaxRuntimeError:
        return False
    return True


# JAX 0.11.2 removed the second emitter.
QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
QUICK = {option: value for option, value in QUICK.items() if is_known(option, value)}

# JAX takes such options from a caller of `jit` alone. Where JAX no longer has this function,
# the tests are slower, and nothing else changes.
if get_compile_options := getattr(compiler, "get_compile_options", None):

    @functools.wraps(get_compile_options)
    def with_quick_options(*args, env_options_overrides=None, **kwargs):
        quick = QUICK if jax.config.values[FEW] else {}
        overrides = quick | (env_options_overrides or {})
        return get_compile_options(*args, env_options_overrides=overrides, **kwargs)

    compiler.get_compile_options = with_quick_options


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
