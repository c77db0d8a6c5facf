"""What accelerators take of two ways, on a CPU: tests of large arrays and searches again."""

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from tests import test_parts, test_rootfinding, test_scores
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

test_filters_against_brute_force = test_scores.test_filters_against_brute_force
test_filters_take_an_option_per_slice = test_scores.test_filters_take_an_option_per_slice
test_filters_keep_ties = test_scores.test_filters_keep_ties
test_filters_at_the_edges = test_scores.test_filters_at_the_edges
test_filters_of_long_slices = test_scores.test_filters_of_long_slices
test_top_k_of_special_numbers = test_scores.test_top_k_of_special_numbers

test_by_count = test_rootfinding.test_largest_threshold_by_count_is_the_kth_largest
test_by_weight = test_rootfinding.test_largest_threshold_by_weight
test_climb = test_rootfinding.test_climb_finds_roots_of_convex_functions
test_climb_of_nan = test_rootfinding.test_climb_gives_up_on_nan_in_its_own_slice_only
test_the_end_of_a_climb = test_rootfinding.test_climb_ends_at_the_root_or_after_a_short_step
test_bracketed_newton = test_rootfinding.test_bracketed_newton_where_newton_alone_diverges


def test_the_other_way_is_taken():
    """A search there looks at an entry in few passes, whose number is known beforehand."""
    jaxpr = jax.make_jaxpr(lambda z: sj.top_k_filter(z, 3))(jnp.zeros(8, jnp.float32))
    assert list(lengths_of_scans(jaxpr.jaxpr)) == [11]


def lengths_of_scans(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn.params["length"]
        for inner in jex.core.jaxprs_in_params(eqn.params):
            yield from lengths_of_scans(inner)


def test_batches_and_parts_of_them():
    z = jnp.asarray(np.random.default_rng(0).standard_normal((4, 500)))
    rows = jax.sharding.PartitionSpec("rows")
    for fn in (lambda z: sj.top_p_filter(z, 0.5), sj.sparsemax, sj.softmax):
        spread = jax.shard_map(fn, mesh=mesh(rows=2), in_specs=rows, out_specs=rows)
        assert_same(jax.jit(spread)(z), fn(z))
        assert_same(jax.vmap(fn)(z), fn(z))
