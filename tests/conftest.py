"""Every test runs in 64-bit, with strict promotion of dtypes and ranks, on four CPU devices."""

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 4)  # For meshes; all else runs on the first.
