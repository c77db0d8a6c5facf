"""Losses from logits, one number an example, that stay exact when the model is confident.

Every loss here is the regret of a threshold map p = f(z - tau) (a Fenchel-Young loss): it is
0 where p puts all weight on the label, and its gradient is p - y. Both are computed without
the subtractions that cancel there, so a loss of 1e-30 has all its digits, and so does its
gradient. Losses are float32 or wider, whatever the logits' dtype.

A label outside [0, n) makes the loss of its row, and the gradient, NaN; under `checkify` it is
an error that names the row. A dropped label has loss inf.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._exact import expm1_over, expm1_over_twice, log1p, long_sum
from softjax._exponential import SOFTMAX
from softjax._inputs import (
    NONNEGATIVE,
    PROBABILITY,
    Axis,
    Classes,
    broadcast,
    check_labels,
    equal,
    is_zero,
    known_labels,
    per_slice,
    prepare,
    public,
    resolve_one_axis,
    to_float,
)
from softjax._slices import AlongAxes
from softjax._threshold import Family, Solution, solve
from softjax.entropies import divergence, pick
from softjax.sparse import ENTMAX, MAX_ALPHA, SPARSEMAX

__all__ = [
    "class_balanced_weights",
    "cross_entropy",
    "distillation_loss",
    "entmax_loss",
    "focal_loss",
    "mean_loss",
    "soft_cross_entropy",
    "sparsemax_loss",
]


@public("axis", "ignore_index", label_smoothing=PROBABILITY)
def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
) -> Array:
    r"""Measures the surprise at one label a slice, in nats.

    .. math:: (1 - \epsilon) w_y (-\log p_y)
        + \frac{\epsilon}{n} \sum_j m_j w_j (-\log p_j) + c \, (\log Z)^2, \qquad
        p = \mathrm{softmax}(z), \; Z = \sum_j m_j e^{z_j}

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        labels: classes y, int, of the shape of `logits` without `axis`.
        axis: the one axis of the n classes.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry. The n of the
            smoothing counts what is kept.
        ignore_index: a label, of any value, whose rows have loss and gradient 0.
        label_smoothing: epsilon in [0, 1], one number or one a label; differentiable.
        z_loss: factor c of the squared logarithm of the normaliser, one number or one a label;
            differentiable.
        class_weights: factors w, `[n]`, real; differentiable. With smoothing they weigh as in
            PyTorch's `cross_entropy`.

    Returns:
        One loss a label, float32 or wider, of the shape of `labels`; never negative.
        `mean_loss` averages them.

    Raises:
        TypeError: `logits` is not real, `labels` not integer, `where` not bool, or `axis` not
            one int.
        ValueError: an argument does not broadcast, `axis` is out of range, or
            `label_smoothing` is a Python number outside of [0, 1].

    Example:
        >>> print(cross_entropy(jnp.array([[0.0, 0.0], [50.0, 0.0]]), jnp.array([1, 0])))
        [6.9314718e-01 1.9287499e-22]

    Note:
        O(n) time; the gradient keeps nothing but the probabilities, and no one-hot array.
        Computed as (max - z_y) + log1p(sum over the others), of relative error about 2e-7 in
        float32 at every size of the loss; the label's derivative is minus the sum of the other
        probabilities, not p - 1. Both modes, any order.

    Reference:
        Szegedy et al. (2016), Rethinking the inception architecture, for the smoothing;
        Chowdhery et al. (2022), PaLM, for the z-loss.
    """
    rows = _rows(logits, labels, axis, where, ignore_index)
    smoothed = not is_zero(label_smoothing)
    if not smoothed and is_zero(z_loss):
        loss = surprise(rows.logits, rows.labels, rows.axis)
        return rows.finish(loss * _label_weights(class_weights, rows))
    solution = solve(SOFTMAX, AlongAxes((rows.axis,)), rows.logits)
    loss = _surprise(solution, rows.labels, rows.axis, None) * _label_weights(
        class_weights, rows
    )
    if smoothed:
        epsilon = _per_label(label_smoothing, rows, "label_smoothing")
        loss = (1 - epsilon) * loss + epsilon * _even_surprise(solution, class_weights, rows)
    if not is_zero(z_loss):
        factor = _per_label(z_loss, rows, "z_loss")
        peak = jnp.max(jax.lax.stop_gradient(rows.logits), rows.axis, initial=-jnp.inf)
        log_total = peak + jnp.squeeze(solution.threshold, rows.axis)
        loss += factor * jnp.where(jnp.isfinite(log_total), log_total, 0) ** 2
    return rows.finish(loss)


def _even_surprise(solution: Solution, class_weights: ArrayLike | None, rows: "_Rows") -> Array:
    """The mean of -w log p over the kept classes."""
    kept = rows.logits != -jnp.inf
    count = jnp.sum(kept, rows.axis, dtype=rows.logits.dtype)
    weights = _spread_weights(class_weights, rows)
    terms = jnp.where(kept, -solution.margins, 0) * weights
    total = jnp.squeeze(AlongAxes((rows.axis,)).sum(terms), rows.axis)
    return total / jnp.maximum(count, 1)


@public("axis")
def soft_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Measures the expected surprise under target weights, in nats.

    .. math:: -\sum_j m_j t_j \log p_j, \qquad p = \mathrm{softmax}(z)

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        targets: weights t >= 0, broadcastable to `[*shape]`; differentiable. They need not sum
            to one.
        axis: axis, axes, or None for all, along which a slice runs.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.

    Returns:
        One loss a slice, float32 or wider; inf where a target stands on an entry that -inf
        drops.

    Raises:
        TypeError: `logits` or `targets` is not real, or `where` not bool.
        ValueError: `targets` or `where` does not broadcast, or `axis` is out of range.

    Example:
        >>> print(soft_cross_entropy(jnp.zeros(2), jnp.array([0.25, 0.75])))
        0.6931472

    Note:
        O(n). A target of 0 counts as nothing whatever its logit. Both modes, any order.
    """
    problem = prepare(logits, axis=axis, where=where)
    targets, _ = to_float(targets, name="targets")
    targets = broadcast(
        targets.astype(problem.logits.dtype), problem.logits.shape, name="targets"
    )
    if where is not None:
        targets = jnp.where(problem.logits == -jnp.inf, jnp.where(where, targets, 0), targets)
    slices = AlongAxes(problem.axes)
    margins = solve(SOFTMAX, slices, problem.logits).margins
    dropped = margins == -jnp.inf
    terms = jnp.where(dropped, 0, targets) * -jnp.where(dropped, 0, margins)
    impossible = dropped & (targets > 0)
    terms = jnp.where(impossible, jnp.inf, terms)
    return jnp.squeeze(slices.sum(terms), problem.axes)


@public("axis", temperature=NONNEGATIVE)
def distillation_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike,
    axis: Axis = -1,
) -> Array:
    r"""Measures how far a student is from its teacher, both softened by a temperature.

    .. math:: T^2 D\big(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(s / T)\big)

    Args:
        student_logits: scores s, `[*shape]`, real or -inf (dropped); differentiable.
        teacher_logits: scores t, `[*shape]`, real or -inf (dropped); differentiable.
        temperature: T in (0, inf), one number or one a slice; differentiable.
        axis: axis, axes, or None for all, along which a slice runs.

    Returns:
        One loss a slice, float32 or wider, at least 0; inf where the student drops what the
        teacher keeps.

    Raises:
        TypeError: logits are not real.
        ValueError: the shapes differ, `temperature` does not broadcast to one a slice or is a
            negative Python number, or `axis` is out of range.

    Example:
        >>> print(distillation_loss(jnp.zeros(2), jnp.zeros(2), temperature=2.0))
        0.0

    Note:
        The factor keeps gradients of one size as the temperature changes. O(n); precise also
        where the two are close, as `kl_divergence`. Both modes, any order.

    Reference:
        Hinton, Vinyals and Dean (2015), Distilling the knowledge in a neural network.
    """
    student = prepare(student_logits, axis=axis, temperature=temperature, name="student_logits")
    teacher = prepare(teacher_logits, axis=axis, temperature=temperature, name="teacher_logits")
    row = divergence(teacher, student, name="student_logits", target="teacher_logits")
    scale = jnp.asarray(temperature).astype(row.dtype)
    if student.temperature is not None:
        scale = jnp.broadcast_to(student.temperature, row.shape)
    return jnp.squeeze(row * scale * scale, student.axes)


@public("axis", gamma=NONNEGATIVE)
def focal_loss(
    logits: ArrayLike, labels: ArrayLike, *, gamma: ArrayLike, axis: int = -1
) -> Array:
    r"""Measures the surprise at a label, discounted where the model is already right.

    .. math:: -(1 - p_y)^\gamma \log p_y, \qquad p = \mathrm{softmax}(z)

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        labels: classes y, int, of the shape of `logits` without `axis`.
        gamma: the discount, at least 0 (0 is `cross_entropy`), one number or one a label;
            differentiable.
        axis: the one axis of the classes.

    Returns:
        One loss a label, float32 or wider.

    Raises:
        TypeError: as `cross_entropy`.
        ValueError: as `cross_entropy`; also if `gamma` is a negative Python number.

    Example:
        >>> print(focal_loss(jnp.zeros(2), jnp.array(1), gamma=2.0))
        0.1732868

    Note:
        O(n). 1 - p is computed from log p without cancellation. Both modes, any order, where
        p_y < 1.

    Reference:
        Lin et al. (2017), Focal loss for dense object detection.
    """
    rows = _rows(logits, labels, axis, None, None)
    gamma = _per_label(gamma, rows, "gamma")
    nats = surprise(rows.logits, rows.labels, rows.axis)
    dropped = nats == jnp.inf
    finite = jnp.where(dropped, 1, nats)
    missing = -jnp.expm1(-finite)
    some = missing > 0
    discount = jnp.where(
        some, jnp.where(some, missing, 1) ** gamma, jnp.where(gamma == 0, 1, 0)
    )
    return rows.finish(jnp.where(dropped, nats, discount * finite))


@public("axis")
def sparsemax_loss(logits: ArrayLike, labels: ArrayLike, *, axis: int = -1) -> Array:
    r"""Measures the regret of `sparsemax` at a label; 0 once the label leads by a margin of 1.

    .. math:: \tfrac12 \lVert e_y - z \rVert^2 - \tfrac12 \lVert p - z \rVert^2, \qquad
        p = \mathrm{sparsemax}(z)

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        labels: classes y, int, of the shape of `logits` without `axis`.
        axis: the one axis of the classes.

    Returns:
        One loss a label, float32 or wider.

    Raises:
        TypeError: as `cross_entropy`.
        ValueError: as `cross_entropy`.

    Example:
        >>> print(sparsemax_loss(jnp.array([[0.0, 0.0], [1.0, 0.0]]), jnp.array([0, 0])))
        [0.25 0.  ]

    Note:
        The Fenchel-Young loss of `sparsemax`: its gradient is p - e_y. A sum of terms that are
        never negative. O(n) a pass. Both modes, any order.

    Reference:
        Martins and Astudillo (2016), From softmax to sparsemax; Blondel, Martins and Niculae
        (2020), Learning with Fenchel-Young losses.
    """
    rows = _rows(logits, labels, axis, None, None)
    alpha = jnp.full((1,) * rows.logits.ndim, 2.0, rows.logits.dtype)
    return rows.finish(_regret(_SPARSEMAX, rows.axis, rows.logits, rows.labels, alpha))


@public("axis", alpha=(1, MAX_ALPHA))
def entmax_loss(
    logits: ArrayLike, labels: ArrayLike, alpha: ArrayLike = 1.5, *, axis: int = -1
) -> Array:
    r"""Measures the regret of `entmax` at a label: between cross-entropy and sparsemax loss.

    .. math:: \langle p - e_y, z \rangle + H_\alpha(p), \qquad p = \mathrm{entmax}_\alpha(z)

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        labels: classes y, int, of the shape of `logits` without `axis`.
        alpha: entropic index in [1, 10000], one number or one a slice (size 1 along `axis`);
            differentiable, with `cross_entropy` as the limit at 1.
        axis: the one axis of the classes.

    Returns:
        One loss a label, float32 or wider.

    Raises:
        TypeError: as `cross_entropy`.
        ValueError: as `cross_entropy`; also if `alpha` is a Python number outside of that, or
            does not broadcast to one a slice.

    Example:
        >>> print(entmax_loss(jnp.zeros(2), jnp.array(1)))
        0.39052433

    Note:
        Its gradient is p - e_y; it is 0 once the label leads by 1 / (alpha - 1). A sum of terms
        that are never negative. O(n) a pass. Both modes, any order.

    Reference:
        Peters, Niculae and Martins (2019), Sparse sequence-to-sequence models; Blondel, Martins
        and Niculae (2020), Learning with Fenchel-Young losses.
    """
    rows = _rows(logits, labels, axis, None, None)
    alpha = per_slice(alpha, rows.logits, (rows.axis,), name="alpha")
    alpha = jnp.broadcast_to(alpha, _kept_shape(rows))
    return rows.finish(_regret(_ENTMAX, rows.axis, rows.logits, rows.labels, alpha))


@public("ignore_index")
def mean_loss(
    losses: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
    class_weights: ArrayLike | None = None,
    example_weights: ArrayLike | None = None,
) -> Array:
    r"""Averages losses over the examples that count.

    .. math:: \sum_i a_i L_i \Big/ \sum_i a_i w_{y_i}

    Args:
        losses: one loss L an example, `[*shape]`, already multiplied by the class weights (as
            `cross_entropy` does); differentiable.
        labels: classes y, int, `[*shape]`; needed with `ignore_index` and `class_weights`.
        ignore_index: a label whose examples do not count.
        class_weights: the factors w, `[n]`, that the losses were computed with (1 without).
        example_weights: factors a, broadcastable to `[*shape]`; differentiable. An example of
            weight 0 does not count, whatever its loss.

    Returns:
        One number, in the dtype of `losses` (float32 or wider); 0 where nothing counts, where
        PyTorch has NaN.

    Raises:
        TypeError: `losses` is not real or `labels` not integer.
        ValueError: an argument does not broadcast, or `labels` is missing where needed.

    Example:
        >>> print(mean_loss(jnp.array([1.0, 3.0, 0.0]), jnp.array([0, 2, -1]), ignore_index=-1))
        2.0

    Note:
        O(number of examples). Divides by the weights of the labels, as PyTorch's mean does.
    """
    losses, _ = to_float(losses, name="losses")
    shares = jnp.ones_like(losses)
    if example_weights is not None:
        example_weights, _ = to_float(example_weights, name="example_weights")
        shares = broadcast(
            example_weights.astype(losses.dtype),
            losses.shape,
            name="example_weights",
            target="losses",
        )
    if labels is None and not (ignore_index is None and class_weights is None):
        raise ValueError("`labels` must be given with `ignore_index` or `class_weights`.")
    masses = shares
    if labels is not None:
        labels = check_labels(labels, (*losses.shape, 1), losses.ndim)
        if ignore_index is not None:
            shares = jnp.where(equal(labels, ignore_index), 0, shares)
        masses = shares
        if class_weights is not None:
            weights, _ = to_float(class_weights, name="class_weights")
            if weights.ndim != 1:
                raise ValueError(f"`class_weights` must be a vector, got {weights.shape}.")
            known = (labels >= 0) & (labels < weights.shape[-1])
            chosen = weights.astype(losses.dtype)[jnp.where(known, labels, 0)]
            masses = shares * jnp.where(known, chosen, 1)
    # (A weight of 0 has its derivative, if the loss that it weighs is a number.)
    counted = jnp.where((shares != 0) | jnp.isfinite(losses), losses, 0)
    total, mass = _sum_of_all(shares * counted), _sum_of_all(masses)
    return total / jnp.where(mass == 0, 1, mass)


def _sum_of_all(x: Array) -> Array:
    # In blocks of its own: XLA may run a plain sum through all of them one by one.
    return jnp.sum(long_sum(x.reshape(-1, 1), (0,)))


@public(beta=PROBABILITY)
def class_balanced_weights(counts: ArrayLike, *, beta: ArrayLike) -> Array:
    r"""Weighs classes by the inverse of their effective numbers of examples.

    .. math:: w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}, \qquad \sum_c w_c = C

    Args:
        counts: numbers of examples n, `[C]`, at least 0.
        beta: in [0, 1]: 0 weighs all classes alike, 1 by 1 / n; differentiable.

    Returns:
        Weights `[C]`, of mean one over the classes that have examples; 0 for the others.

    Raises:
        TypeError: `counts` is not real.
        ValueError: `beta` is a Python number outside of [0, 1].

    Example:
        >>> print(class_balanced_weights(jnp.array([100, 1]), beta=1.0))
        [0.01980198 1.980198  ]

    Reference:
        Cui et al. (2019), Class-balanced loss based on effective number of samples.
    """
    counts, dtype = to_float(counts, name="counts")
    beta = jnp.asarray(beta).astype(counts.dtype)
    seen = counts > 0
    safe = jnp.where(seen, counts, 1)
    # (1 - beta^n) / (1 - beta) = n phi(n log beta) / phi(log beta), phi(v) = (e^v - 1) / v.
    rate = jnp.log(jnp.where(beta > 0, beta, 1))
    effective = safe * expm1_over(safe * rate) / expm1_over(rate)
    effective = jnp.where(beta > 0, effective, 1)
    weights = jnp.where(seen, 1 / effective, 0)
    mean = jnp.sum(weights) / jnp.maximum(jnp.sum(seen, dtype=counts.dtype), 1)
    return (weights / jnp.where(mean == 0, 1, mean)).astype(dtype)


class _Rows(NamedTuple):
    """Logits with one label a slice."""

    logits: Array
    classes: Classes  # of the shape of logits without the axis
    axis: int

    @property
    def labels(self) -> Array:
        return self.classes.labels

    def finish(self, loss: Array) -> Array:
        return self.classes.finish(loss)


def _rows(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int,
    where: ArrayLike | None,
    ignore_index: int | None,
) -> _Rows:
    problem = prepare(logits, axis=axis, where=where)
    axis = resolve_one_axis(axis, problem.logits.ndim)
    labels = check_labels(labels, problem.logits.shape, axis)
    logits = problem.logits
    classes = known_labels(labels, logits.shape[axis], ignore_index)
    if classes.ignored is not None:
        logits = jnp.where(jnp.expand_dims(classes.ignored, axis), 0, logits)
    return _Rows(logits, classes, axis)


def _kept_shape(rows: _Rows) -> tuple[int, ...]:
    return tuple(1 if i == rows.axis else n for i, n in enumerate(rows.logits.shape))


def _per_label(option: ArrayLike, rows: _Rows, name: str) -> Array:
    value, _ = to_float(option, name=name)
    return broadcast(
        value.astype(rows.logits.dtype), rows.labels.shape, name=name, target="labels"
    )


def _spread_weights(class_weights: ArrayLike | None, rows: _Rows) -> Array:
    """Class weights along the axis of the classes."""
    if class_weights is None:
        return jnp.ones((1,) * rows.logits.ndim, rows.logits.dtype)
    weights, _ = to_float(class_weights, name="class_weights")
    num_classes = rows.logits.shape[rows.axis]
    if weights.shape != (num_classes,):
        raise ValueError(
            f"`class_weights` must have the shape ({num_classes},), got {weights.shape}."
        )
    others = tuple(i for i in range(rows.logits.ndim) if i != rows.axis)
    return jnp.expand_dims(weights.astype(rows.logits.dtype), others)


def _label_weights(class_weights: ArrayLike | None, rows: _Rows) -> Array:
    if class_weights is None:
        return jnp.ones((), rows.logits.dtype).reshape((1,) * rows.labels.ndim)
    return _spread_weights(class_weights, rows).reshape(-1)[rows.labels]


class _Regret(NamedTuple):
    """A Fenchel-Young loss (static): its map, and its value from what the map found."""

    family: Family
    value: Callable[..., Array]  # of (solution, labels, axis, alpha)
    missing: Callable[..., Array]  # 1 - p_y, of (solution, loss, labels, axis)


def surprise(logits: Array, labels: Array, axis: int) -> Array:
    """-log p of labels in [0, n): `cross_entropy` of what has been prepared."""
    return _regret(_CROSS_ENTROPY, axis, logits, labels, None)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _regret(
    kind: _Regret, axis: int, logits: Array, labels: Array, alpha: Array | None
) -> Array:
    solution = solve(kind.family, AlongAxes((axis,)), logits, index=alpha)
    return kind.value(solution, labels, axis, alpha)


@_regret.defjvp
def _regret_jvp(kind: _Regret, axis: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    # By the envelope theorem p need not be differentiated: the tangent is <p - e_y, z'>, and in
    # alpha that of the entropy at a fixed p. 1 - p_y is not computed by that subtraction.
    logits, labels, alpha = primals
    logits_dot, _, alpha_dot = tangents
    solution = solve(kind.family, AlongAxes((axis,)), logits, index=alpha)
    loss = kind.value(solution, labels, axis, alpha)
    dropped = pick(logits, labels, axis) == -jnp.inf
    missing = jnp.where(dropped, 0, kind.missing(solution, loss, labels, axis))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def pair(probs: Array, missing: Array, logits_dot: Array) -> Array:
        hit = _hit(probs, labels, axis)
        slope = jnp.where(hit, -jnp.expand_dims(missing, axis), probs)
        terms = jnp.where(slope != 0, slope * logits_dot, 0)
        return jnp.squeeze(AlongAxes((axis,)).sum(terms), axis)

    loss_dot = pair(solution.probs, missing, logits_dot)
    if alpha is not None:
        entropy = functools.partial(_tsallis, solution.probs, axis=axis)
        loss_dot += jax.jvp(entropy, (alpha,), (alpha_dot,))[1]
    return loss, loss_dot


def _hit(x: Array, labels: Array, axis: int) -> Array:
    """Which entries the labels name; fused into what reads it, never an array."""
    places = jax.lax.broadcasted_iota(labels.dtype, x.shape, axis)
    return places == jnp.expand_dims(labels, axis)


def _surprise(solution: Solution, labels: Array, axis: int, _: None) -> Array:
    return -pick(solution.margins, labels, axis)


def _missing_from_surprise(_: Solution, loss: Array, labels: Array, axis: int) -> Array:
    return -jnp.expm1(-loss)


def _sum_of_others(solution: Solution, _: Array, labels: Array, axis: int) -> Array:
    others = jnp.where(_hit(solution.probs, labels, axis), 0, solution.probs)
    return jnp.squeeze(AlongAxes((axis,)).sum(others), axis)


def _sparse_regret(
    level: float, solution: Solution, labels: Array, axis: int, alpha: Array
) -> Array:
    # With b = alpha - 1 and l = -log p_y the loss is
    #     sum_{j != y} p_j^alpha / alpha + int_{p_y}^1 t^(b - 1) (1 - t) dt,
    # and the integral is l^2 (alpha psi(-alpha l) - b psi(-b l)), psi(v) = (e^v - 1 - v) / v^2.
    # Outside of the support it is level - 1 / alpha - margin, where `level` is the margin of
    # an entry of weight 1.
    probs = solution.probs
    hit = _hit(probs, labels, axis)
    others = jnp.where(hit, 0, probs)
    some = others > 0
    powers = jnp.where(some, jnp.where(some, others, 1) ** alpha, 0) / alpha
    slices = AlongAxes((axis,))
    rest, first = slices.sum(others), slices.sum(powers)
    margin = jnp.expand_dims(pick(solution.margins, labels, axis), axis)
    p = jnp.expand_dims(pick(probs, labels, axis), axis)
    bend = alpha - 1
    # (Where p is small, the subtraction 1 - rest would cancel in its turn.)
    near, inside = rest < 0.5, p > 0
    surprise = jnp.where(
        near, -log1p(-jnp.where(near, rest, 0)), -jnp.log(jnp.where(inside, p, 1))
    )
    integral = (
        surprise
        * surprise
        * (
            alpha * expm1_over_twice(-alpha * surprise)
            - bend * expm1_over_twice(-bend * surprise)
        )
    )
    outside = level - 1 / alpha - jnp.where(inside, 0, margin)
    loss = first + jnp.where(inside, integral, outside)
    sound = ~jnp.isnan(rest + p) | (margin == -jnp.inf)  # A comparison with NaN hides it.
    return jnp.squeeze(jnp.where(sound, loss, jnp.nan), axis)


def _tsallis(probs: Array, alpha: Array, *, axis: int) -> Array:
    """sum(p - p^alpha) / (alpha (alpha - 1)), by the slice, and Shannon's entropy at 1."""
    some = probs > 0
    logs = jnp.log(jnp.where(some, probs, 1))
    terms = -probs * logs * expm1_over((alpha - 1) * logs)
    return jnp.squeeze(AlongAxes((axis,)).sum(terms) / alpha, axis)


_CROSS_ENTROPY = _Regret(SOFTMAX, _surprise, _missing_from_surprise)
_SPARSEMAX = _Regret(SPARSEMAX, functools.partial(_sparse_regret, 1.0), _sum_of_others)
_ENTMAX = _Regret(ENTMAX, functools.partial(_sparse_regret, 0.0), _sum_of_others)
