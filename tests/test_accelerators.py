"""What accelerators take of two ways, on a CPU: tests of large arrays again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from tests import test_parts
from tests.helpers import assert_same
from tests.test_sharding import mesh

pytestmark = pytest.mark.usefixtures("as_on_accelerators")

small_parts = test_parts.small_parts
test_value = test_parts.test_value
test_a_confident_row_keeps_its_digits = test_parts.test_a_confident_row_keeps_its_digits
test_edges = test_parts.test_edges
test_exponentials_from_a_base = test_parts.test_exponentials_from_a_base
test_sums_at_the_edge_of_a_base = test_parts.test_sums_at_the_edge_of_a_base
test_edges_of_exponentials_from_a_base = test_parts.test_edges_of_exponentials_from_a_base
test_equal_entries_share_the_mass = test_parts.test_equal_entries_share_the_mass
test_a_nan_outlasts_all_else = test_parts.test_a_nan_outlasts_all_else
test_a_nan_outlasts_a_reduction = test_parts.test_a_nan_outlasts_a_reduction
test_plain_differentiation = test_parts.test_plain_differentiation
test_transformed = test_parts.test_transformed


def test_batches_and_parts_of_them():
    z = jnp.asarray(np.random.default_rng(0).standard_normal((4, 500)))
    rows = jax.sharding.PartitionSpec("rows")
    for fn in (lambda z: sj.top_p_filter(z, 0.5), sj.sparsemax, sj.softmax):
        spread = jax.shard_map(fn, mesh=mesh(rows=2), in_specs=rows, out_specs=rows)
        assert_same(jax.jit(spread)(z), fn(z))
        assert_same(jax.vmap(fn)(z), fn(z))
