"""Terms of a cross-entropy: the label's, that of smoothing, and the z-loss."""

import jax
import jax.numpy as jnp
from jax import Array


def cross_entropy_terms(
    nll: Array,
    logsumexp: Array,
    uniform_nll: Array | None,
    *,
    label_weight: Array | None,
    smoothing: Array | None,
    z_loss: Array | None,
) -> tuple[Array, ...]:
    """The smoothed cross-entropy and, if there is one, the z-loss.

    Args:
        nll: -log p of the label.
        logsumexp: the logarithm of the normaliser.
        uniform_nll: the mean of -log p times the class weights; given with `smoothing`.
        label_weight: the class weight of the label.
        smoothing: the share of `uniform_nll`.
        z_loss: the factor of the squared logarithm of the normaliser.
    """
    factor = jnp.ones_like(nll) if label_weight is None else label_weight
    if smoothing is not None:
        factor = factor * (1 - smoothing)
    loss = times_nll(factor, nll)
    if smoothing is not None and uniform_nll is not None:
        loss += times_nll(smoothing, uniform_nll)
    if z_loss is None:
        return (loss,)
    finite = jnp.where(jnp.isfinite(logsumexp), logsumexp, 0)
    return loss, z_loss * finite**2


def times_nll(factor: Array, nll: Array) -> Array:
    """Computes factor * nll; 0 where the factor is 0, and constant where nll is infinite."""
    infinite = nll == jnp.inf
    constant = jnp.where(factor == 0, 0, jnp.sign(factor) * jnp.inf)
    constant *= jnp.ones_like(nll)  # This spreads it over a mesh as nll is spread.
    product = factor * jnp.where(infinite, 0, nll)
    return jnp.where(infinite, jax.lax.stop_gradient(constant), product)
