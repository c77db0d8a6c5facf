"""Calibration: whether probabilities are frequencies, and what to do where they are not.

A temperature that is fitted to labels, measures of miscalibration, averages of several models,
sets of classes that hold the label as often as they promise, and a score for inputs of no known
class.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from softjax._api import NONNEGATIVE, POSITIVE, api
from softjax._elementary import log1p
from softjax._inputs import (
    Axis,
    Classes,
    broadcast,
    check_int,
    is_static_zero,
    known_labels,
    labels_of,
    nan_outside,
    one_number,
    prepare,
    resolve_one_axis,
    to_float,
    to_integers,
)
from softjax._mesh import AxisName, names_of, vary
from softjax._rootfinding import bracketed_newton
from softjax._slices import AlongAxes, BySegment
from softjax._softmax import SOFTMAX
from softjax._threshold import solve
from softjax.dense import log_softmax
from softjax.losses._labels import label_rows
from softjax.losses._reduction import check_reduction, reduce_kept
from softjax.policies import soft_value
from softjax.reductions import logsumexp

__all__ = [
    "brier_score",
    "conformal_threshold",
    "energy_score",
    "ensemble_log_probs",
    "expected_calibration_error",
    "fit_temperature",
    "prediction_sets",
    "reliability",
]

Bins = Literal["width", "mass"]
Kind = Literal["threshold", "aps", "raps"]
Space = Literal["probability", "logit"]

_SLACK = 1e-3  # by which a probability may leave [0, 1], because of rounding


@api("axis", "ignore_index", "num_groups")
def fit_temperature(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    groups: ArrayLike | None = None,
    num_groups: int | None = None,
) -> Array:
    r"""Finds the temperature at which labels are most likely.

    .. math:: T^* = \arg\min_T \sum_i -\log \mathrm{softmax}(z_i / T)_{y_i}

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        labels: classes y, int, of the shape of `logits` without `axis`.
        axis: the one axis of the classes.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.
        ignore_index: a label whose rows do not count, whatever they hold.
        groups: which temperature a label belongs to, int, of the shape of `labels`; a label of
            a group outside of [0, num_groups) does not count. None puts all into one.
        num_groups: how many temperatures there are; given with `groups`.

    Returns:
        One number, or `[num_groups]` with `groups`, float32 or wider. 0 where every label is at
        a peak of its slice, inf where the labels are no more likely than by chance, 1 where no
        temperature is better than another. A row with a dropped label or a kept +inf does not
        count, because its likelihood is the same at all temperatures. NaN where a label that
        counts is unknown, with gradient 0, and where its slice keeps a NaN, with gradient NaN.

    Raises:
        TypeError: `logits` is not real, `labels` or `groups` not integer, `where` not bool, or
            `axis` not one int.
        ValueError: `labels` or `groups` is of another shape, `groups` comes without
            `num_groups` or the reverse, or `axis` is out of range.

    Example:
        >>> logits = jnp.log(jnp.array([[0.9, 0.1]] * 4))
        >>> print(round(float(fit_temperature(logits, jnp.array([0, 0, 0, 1]))), 4))
        2.0

    Note:
        The problem is convex in 1 / T, and Newton's method within a bracket takes about ten
        passes over the logits, O(n) each. Fit on examples that the model was not trained on.
        The derivative is that of the minimum, by the implicit function theorem: in both modes,
        of any order; 0 at the limits.

    Reference:
        Guo et al. (2017), On calibration of modern neural networks.
    """
    if (groups is None) != (num_groups is None):
        raise ValueError("`groups` and `num_groups` must be given together.")
    count = 1 if num_groups is None else check_int(num_groups, name="num_groups", least=0)
    rows = label_rows(logits, labels, axis, where, ignore_index)
    x = jnp.moveaxis(rows.logits, rows.axis, -1)
    x = x.reshape(rows.labels.size, x.shape[-1])
    ids = jnp.zeros(rows.labels.shape, jnp.int32)
    if groups is not None:
        groups = to_integers(groups, name="groups")
        ids = broadcast(groups, rows.labels.shape, name="groups", target="labels")
    kept = rows.classes.known
    ignored = rows.classes.ignored
    if ignored is not None:
        ids = jnp.where(ignored, -1, ids)
    ids = jnp.where((ids >= 0) & (ids < count), ids, count)  # The last group does not count.
    slices = BySegment(vary(ids.reshape(-1).astype(jnp.int32), x), count + 1)
    temperature = _fit(slices, x, rows.labels.reshape(-1), kept.reshape(-1))[:count]
    return temperature[0] if num_groups is None else temperature


def _fit(slices: BySegment, x: Array, labels: Array, known: Array) -> Array:
    """The temperature of each group of rows `[rows, n]`."""
    peak = lax.stop_gradient(jnp.max(x, -1, keepdims=True, initial=-jnp.inf))
    at_label = jnp.where(known, AlongAxes((1,)).pick(x, labels), jnp.nan)
    broken = jnp.any(jnp.isnan(x), -1) | jnp.isnan(at_label)
    counts = ~broken & jnp.isfinite(peak[:, 0]) & (at_label != -jnp.inf)
    # Gaps to the peak, at most 0. A dropped entry, or one in a row that does not count, has the
    # gap 0, so that no product is NaN.
    dropped = (x == -jnp.inf) | ~counts[:, None]
    anchor = jnp.where(jnp.isfinite(peak), peak, 0) / 2  # Half of a number does not overflow.
    gaps = jnp.where(dropped, 0, x / 2 - anchor)
    gap = jnp.where(counts, at_label / 2 - anchor[:, 0], 0)
    # The largest gap of each group is the unit, so that no square of one overflows.
    unit = slices.max(-jnp.min(lax.stop_gradient(gaps), -1, initial=0))
    unit = jnp.where(unit > 0, unit, 1)
    of_rows = slices.broadcast(unit)
    gaps, gap = gaps / of_rows[:, None], gap / of_rows
    rows = AlongAxes((1,))

    def step(inverse: Array) -> tuple[Array, Array]:
        """The derivative of the log-likelihood of each group in 1 / T, and minus its slope."""
        of_rows = slices.broadcast(inverse)[:, None]
        probs = solve(SOFTMAX, rows, jnp.where(x == -jnp.inf, -jnp.inf, gaps * of_rows))
        mean = jnp.sum(probs.probs * gaps, -1)
        variance = jnp.sum(probs.probs * (gaps - mean[:, None]) ** 2, -1)
        return (
            slices.sum(jnp.where(counts, gap - mean, 0)),
            slices.sum(jnp.where(counts, variance, 0)),
        )

    zero = vary(jnp.zeros(slices.num, x.dtype), x)
    at_zero, spread = step(zero)
    is_flat = spread == 0
    behind = -slices.sum(gap)
    is_certain = behind == 0
    # At the level of chance the derivative is the rounding error of sums of about `behind`.
    is_chance = at_zero <= 8 * jnp.finfo(x.dtype).eps * behind
    settled = is_flat | is_certain | is_chance

    def of_unsettled(inverse: Array) -> tuple[Array, Array]:
        """As `step`; a group whose temperature is a limit gets a root of its own, at 1."""
        excess, slope = step(inverse)
        return jnp.where(settled, 1 - inverse, excess), jnp.where(settled, 1, slope)

    def search(_: object, start: Array) -> Array:
        short = lambda high: of_unsettled(high)[0] > 0
        grow = lambda state: (jnp.where(short(state[0]), 4 * state[0], state[0]), state[1] + 1)
        growing = lambda state: jnp.any(short(state[0])) & (state[1] < 60)
        high, _ = lax.while_loop(growing, grow, (start, vary(jnp.array(0), start)))
        return bracketed_newton(of_unsettled, zero, high, start)

    along = lambda linear, y: y / linear(jnp.ones_like(y))
    inverse = lax.custom_root(
        lambda inverse: of_unsettled(inverse)[0], jnp.ones_like(zero), search, along
    )
    temperature = 2 * unit / inverse
    temperature = jnp.where(is_chance, jnp.inf, temperature)
    temperature = jnp.where(is_certain, 0, temperature)
    temperature = jnp.where(is_flat, 1, temperature)
    temperature = jnp.where(slices.sum(broken.astype(x.dtype)) > 0, jnp.nan, temperature)
    # Adds the square of each NaN, so that the derivative is NaN too.
    spoilt = jnp.where(jnp.isnan(x), x, 0)
    return temperature + slices.sum(jnp.sum(spoilt * spoilt, -1))


class Reliability(NamedTuple):
    """Bins of examples by their confidence, `[num_bins]` each."""

    confidence: Array  # the mean of the largest probabilities; 0 in an empty bin
    accuracy: Array  # the share of labels that are the likeliest class; 0 in an empty bin
    count: Array  # type: ignore[assignment]  # how many examples there are, as a float


@api("axis", "num_bins", "bins", "ignore_index")
def reliability(
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    num_bins: int = 15,
    bins: Bins = "width",
    ignore_index: int | None = None,
) -> Reliability:
    r"""Groups examples by confidence, and measures the accuracy of each group.

    .. math:: \mathrm{conf}_b = \frac{1}{|B_b|} \sum_{i \in B_b} \max_j p_{ij}, \qquad
        \mathrm{acc}_b = \frac{1}{|B_b|} \sum_{i \in B_b} [y_i = \arg\max_j p_{ij}]

    Args:
        probs: probabilities p, `[*shape]`, in [0, 1]; differentiable.
        labels: classes y, int, of the shape of `probs` without `axis`.
        axis: the one axis of the classes.
        num_bins: how many bins M there are.
        bins: "width" puts a confidence in ((b - 1) / M, b / M] into bin b; "mass" sorts the
            examples into bins of sizes that differ by at most one.
        ignore_index: a label whose rows do not count, whatever they hold.

    Returns:
        A named tuple of `confidence`, `accuracy` and `count`, `[num_bins]` each, float32 or
        wider; 0 in empty bins. Of several likeliest classes the first counts. All are NaN
        where a row that counts has an unknown label, or holds a NaN or a number more than 0.001
        outside of [0, 1], as logits do.

    Raises:
        TypeError: `probs` is not real, `labels` not integer, or `axis` not one int.
        ValueError: `labels` is of another shape, `num_bins` is less than 1, `bins` is none of
            the above, or `axis` is out of range.

    Example:
        >>> probs = jnp.array([[0.9, 0.1], [0.3, 0.7], [0.8, 0.2]])
        >>> print(reliability(probs, jnp.array([0, 1, 1]), num_bins=2).accuracy)
        [0.        0.6666667]

    Note:
        O(n), and a sort of the examples for "mass". The derivative of `confidence` is that of
        the means within the bins; `accuracy` and `count` are constants. Both modes.

    Reference:
        Guo et al. (2017), On calibration of modern neural networks.
    """
    sums = _binned(probs, labels, axis, num_bins, bins, ignore_index)
    divisor = jnp.where(sums.count == 0, 1, sums.count)
    return Reliability(sums.confidence / divisor, sums.accuracy / divisor, sums.count)


@api("axis", "num_bins", "bins", "ignore_index")
def expected_calibration_error(
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    num_bins: int = 15,
    bins: Bins = "width",
    ignore_index: int | None = None,
) -> Array:
    r"""Averages the distance between confidence and accuracy over bins.

    .. math:: \sum_b \frac{|B_b|}{N} \, |\mathrm{acc}_b - \mathrm{conf}_b|

    Args:
        probs: probabilities p, `[*shape]`, in [0, 1]; differentiable.
        labels: classes y, int, of the shape of `probs` without `axis`.
        axis: the one axis of the classes.
        num_bins: how many bins there are, as in `reliability`.
        bins: "width" or "mass", as in `reliability`.
        ignore_index: a label whose rows do not count, whatever they hold.

    Returns:
        One number in [0, 1], float32 or wider; 0 where no row counts, NaN as `reliability`.

    Raises:
        TypeError: as `reliability`.
        ValueError: as `reliability`.

    Example:
        >>> probs = jnp.array([[0.9, 0.1], [0.3, 0.7], [0.8, 0.2]])
        >>> error = expected_calibration_error(probs, jnp.array([0, 1, 1]), num_bins=2)
        >>> print(round(float(error), 4))
        0.1333

    Note:
        Depends on the bins, and is too large where few examples fall into each: compare values
        of equal numbers of examples and bins only. Piecewise differentiable in `probs`.

    Reference:
        Naeini et al. (2015), Obtaining well calibrated probabilities using Bayesian binning;
        Nixon et al. (2019), Measuring calibration in deep learning, for bins of equal mass.
    """
    sums = _binned(probs, labels, axis, num_bins, bins, ignore_index)
    total = jnp.sum(sums.count)
    return jnp.sum(jnp.abs(sums.accuracy - sums.confidence)) / jnp.where(total == 0, 1, total)


def _binned(
    probs: ArrayLike,
    labels: ArrayLike,
    axis: int,
    num_bins: int,
    bins: str,
    ignore_index: int | None,
) -> Reliability:
    """The sums over each bin, not divided by its count."""
    num_bins = check_int(num_bins, name="num_bins", least=1)
    if bins not in get_args(Bins):
        raise ValueError(f'`bins` must be "width" or "mass", got {bins!r}.')
    p, classes, slices = _labelled(probs, labels, axis, ignore_index)
    (axis,) = slices.axes
    ignored = classes.ignored
    counts = jnp.ones(classes.labels.shape, jnp.bool_) if ignored is None else ~ignored
    confidence = jnp.max(p, axis, initial=0)
    right = jnp.argmax(p, axis) == classes.labels if p.shape[axis] else counts
    broken = counts & (~classes.known | jnp.any(jnp.isnan(p), axis))
    confidence, right, counts = (x.reshape(-1) for x in (confidence, right, counts))
    if bins == "width":
        bin_of = jnp.ceil(confidence * num_bins) - 1
        bin_of = jnp.clip(jnp.nan_to_num(bin_of), 0, num_bins - 1).astype(jnp.int32)
    else:
        bin_of = _ranked_bins(jnp.where(counts, confidence, jnp.inf), counts, num_bins)
    by_bin = BySegment(jnp.where(counts, bin_of, num_bins), num_bins + 1)
    # A NaN anywhere makes all bins and the gradient NaN, because it belongs to no bin.
    spoilt = jnp.where(jnp.any(broken), jnp.nan, 1).astype(confidence.dtype)
    sums = (
        by_bin.sum(x.astype(confidence.dtype))[:num_bins] * spoilt
        for x in (confidence, right, counts)
    )
    return Reliability(*sums)


def _ranked_bins(confidence: Array, counts: Array, num_bins: int) -> Array:
    """Bins of equal numbers of the examples that count, in ascending order."""
    order = jnp.argsort(confidence)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    size, larger = jnp.divmod(jnp.sum(counts, dtype=order.dtype), num_bins)
    # The first `larger` bins hold one example more than the others.
    first = (size + 1) * larger
    late = larger + (rank - first) // jnp.maximum(size, 1)
    return jnp.where(rank < first, rank // (size + 1), late).astype(jnp.int32)


def _labelled(
    probs: ArrayLike,
    labels: ArrayLike,
    axis: int,
    ignore_index: int | None,
    axis_name: AxisName = None,
) -> tuple[Array, Classes, AlongAxes]:
    """Probabilities, 0 in ignored rows and NaN where they are none; their labels and slices."""
    p, _ = to_float(probs, name="probs")
    axis = resolve_one_axis(axis, p.ndim)
    slices = AlongAxes((axis,), names_of(axis_name))
    classes = known_labels(labels_of(labels, p.shape, axis), slices.length(p), ignore_index)
    if classes.ignored is not None:
        p = jnp.where(jnp.expand_dims(classes.ignored, axis), 0, p)
    return nan_outside(p, -_SLACK, 1 + _SLACK), classes, slices


@api("axis", "ignore_index", "reduction", "axis_name", spread=("probs",))
def brier_score(
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    ignore_index: int | None = None,
    reduction: Literal["mean", "sum"] | None = None,
    axis_name: AxisName = None,
) -> Array:
    r"""Measures the squared distance of probabilities to the label.

    .. math:: \sum_j (p_j - [j = y])^2

    Args:
        probs: probabilities p, `[*shape]`, in [0, 1]; differentiable.
        labels: classes y, int, of the shape of `probs` without `axis`.
        axis: the one axis of the classes.
        ignore_index: a label whose rows have score and gradient 0, whatever they hold.
        reduction: "mean" over the labels that are not ignored, "sum", or None.
        axis_name: as in `cross_entropy`.

    Returns:
        One number in [0, 2] per label, or one in all with `reduction`, float32 or wider; NaN
        for an unknown label, or beside a probability more than 0.001 outside of [0, 1].

    Raises:
        TypeError: `probs` is not real, `labels` not integer, or `axis` not one int.
        ValueError: `labels` is of another shape, `reduction` is none of the above, or `axis` is
            out of range.

    Example:
        >>> print(brier_score(jnp.array([[0.75, 0.25], [0.0, 1.0]]), jnp.array([0, 0])))
        [0.125 2.   ]

    Note:
        O(n). A proper score: its mean is least where the probabilities are the true ones. Both
        modes, any order.

    Reference:
        Brier (1950), Verification of forecasts expressed in terms of probability.
    """
    check_reduction(reduction)
    p, classes, slices = _labelled(probs, labels, axis, ignore_index, axis_name)
    (axis,) = slices.axes
    places = slices.places(p, classes.labels.dtype)
    targets = (places == jnp.expand_dims(classes.labels, axis)).astype(p.dtype)
    distances = slices.sum_over_devices(jnp.sum((p - targets) ** 2, axis))
    counted = None if classes.ignored is None else ~classes.ignored
    return reduce_kept(classes.finish(distances), counted, reduction)


@api("axis", "member_axis", "space")
def ensemble_log_probs(
    logits: ArrayLike,
    *,
    axis: int = -1,
    member_axis: int = 0,
    where: ArrayLike | None = None,
    space: Space = "probability",
) -> Array:
    r"""Averages the predictions of several models, in log space.

    .. math:: \log \frac{1}{M} \sum_m \mathrm{softmax}(z_m)_i \qquad\text{or}\qquad
        \log \mathrm{softmax}\Big(\frac{1}{M} \sum_m z_m\Big)_i

    Args:
        logits: scores z of all members, `[*shape]`, real or -inf (dropped); differentiable.
        axis: the one axis of the classes.
        member_axis: the one axis of the M members.
        where: mask, bool, broadcastable to `[*shape]`; True keeps an entry.
        space: "probability" averages probabilities, the mixture of the members; "logit"
            averages logits, their normalised geometric mean, which is more confident.

    Returns:
        Log-probabilities in the dtype of `logits`, of its shape without `member_axis`. A class
        that a member drops has weight 0 in the mixture of that member, and is dropped from the
        geometric mean. A member that keeps no class of a slice is left out of the mixture.

    Raises:
        TypeError: `logits` is not real, `where` not bool, or an axis not one int.
        ValueError: `where` does not broadcast, an axis is out of range or given twice, or
            `space` is none of the above.

    Example:
        >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))
        >>> print([round(float(p), 4) for p in jnp.exp(ensemble_log_probs(logits))])
        [0.7, 0.3]

    Note:
        O(n). The mixture is formed from log-probabilities, so that a class that is unlikely for
        all members, or nearly certain for all, keeps its digits. Both modes, any order.

    Reference:
        Lakshminarayanan et al. (2017), Simple and scalable predictive uncertainty estimation
        using deep ensembles.
    """
    if space not in get_args(Space):
        raise ValueError(f'`space` must be "probability" or "logit", got {space!r}.')
    problem = prepare(logits, axis=axis, where=where)
    x = problem.logits
    axis = resolve_one_axis(axis, x.ndim)
    members = resolve_one_axis(member_axis, x.ndim)
    if axis == members:
        raise ValueError(f"`axis` and `member_axis` must differ, got {axis} for both.")
    if space == "logit":
        kept = jnp.all(x != -jnp.inf, members, keepdims=True)
        # The logits are divided before they are added, so that no sum overflows.
        mean = jnp.sum(jnp.where(kept, x, 0) / x.shape[members], members, keepdims=True)
        mixed = log_softmax(jnp.where(kept, mean, -jnp.inf), axis=axis)
        return jnp.squeeze(mixed, members).astype(problem.dtype)
    log_probs = log_softmax(x, axis=axis)
    present = jnp.any(x != -jnp.inf, axis, keepdims=True)
    num = jnp.maximum(jnp.sum(present, members, dtype=jnp.int32), 1).astype(x.dtype)
    # Close to 1, the mean less 1 keeps the digits.
    lacks = jnp.sum(jnp.where(present, jnp.expm1(log_probs), 0), members) / num
    is_likely = lacks > -0.5
    likely = log1p(jnp.where(is_likely, lacks, 0))
    mixed = jnp.where(is_likely, likely, logsumexp(log_probs, axis=members) - jnp.log(num))
    return mixed.astype(problem.dtype)


@api("axis", "level", "kind", "ignore_index", "num_free", penalty=NONNEGATIVE)
def conformal_threshold(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    level: float = 0.9,
    kind: Kind = "threshold",
    axis: int = -1,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    penalty: ArrayLike = 0.0,
    num_free: int = 0,
) -> Array:
    r"""Finds how unlikely a class may be for `prediction_sets` to hold the label often enough.

    .. math:: \lceil (N + 1) \, \ell \, \rceil \text{-th smallest of } s(z_i, y_i), \qquad
        i = 1, \dots, N

    Args:
        logits: scores z of N examples that the model was not trained on, `[*shape]`, real or
            -inf (dropped); differentiable.
        labels: classes y, int, of the shape of `logits` without `axis`.
        level: the wanted share of sets that hold their label, a Python number in (0, 1), taken
            as a fraction whose denominator is at most 46340.
        kind: the score s of a class. "threshold": -log p. "aps": the sum of its probability and
            of all larger ones. "raps": the same, with `penalty` for each class beyond
            `num_free`.
        axis: the one axis of the classes.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.
        ignore_index: a label whose rows do not count, whatever they hold.
        penalty: for "raps" alone, a number that is added per place of a class in the order of
            probabilities, at least 0 (NaN otherwise). An array is refused elsewhere even if it
            holds 0, because its value is not known while tracing.
        num_free: for "raps", how many places are free of it.

    Returns:
        One number, float32 or wider: inf where N is too small for the level, that is below
        level / (1 - level), so that sets hold every class that is not dropped. NaN where a row
        that counts holds a NaN or has an unknown label.

    Raises:
        TypeError: `logits` is not real, `labels` not integer, `where` not bool, or `axis` not
            one int.
        ValueError: `labels` is of another shape, `level` is not in (0, 1), `kind` is none of
            the above, `penalty` or `num_free` comes without "raps", or `axis` is out of range.

    Example:
        >>> logits = jnp.log(jnp.array([[0.75, 0.25]] * 4))
        >>> found = conformal_threshold(logits, jnp.array([0, 0, 0, 1]), level=0.6)
        >>> print(round(float(found), 4))
        0.2877

    Note:
        If the examples and a new one are exchangeable, the set of the new one holds its label
        with probability at least `level`, on average over both, whatever the model is; and at
        most `level` + 1 / (N + 1) if no two scores are equal. The sums of "aps" are not
        randomised, so its sets are larger than needed. A sort of the examples, and for "aps"
        and "raps" one of the classes, O(n log n).

    Reference:
        Sadinle et al. (2019), Least ambiguous set-valued classifiers with bounded error levels,
        for "threshold"; Romano et al. (2020), Classification with valid and adaptive coverage,
        for "aps"; Angelopoulos et al. (2021), Uncertainty sets for image classifiers using
        conformal prediction, for "raps".
    """
    if not isinstance(level, (int, float)) or not 0 < level < 1:
        raise ValueError(f"`level` must be a Python number in (0, 1), got {level!r}.")
    rows = label_rows(logits, labels, axis, where, ignore_index)
    scores = _scores(rows.logits, rows.axis, kind, penalty, num_free)
    scores = jnp.where(rows.classes.known, rows.slices.pick(scores, rows.labels), jnp.nan)
    counts = jnp.ones(scores.shape, jnp.bool_)
    if rows.classes.ignored is not None:
        counts = ~rows.classes.ignored
    broken = jnp.any(counts & jnp.isnan(scores))
    ordered = jnp.sort(jnp.where(counts, scores, jnp.inf), axis=None)
    size = jnp.sum(counts, dtype=jnp.int32)
    # In integers, because a rounded product may be just above a whole number. The denominator
    # is so small that no product leaves int32.
    share = Fraction(repr(float(level))).limit_denominator(46340)
    whole, part = jnp.divmod(size + 1, share.denominator)
    place = whole * share.numerator
    place += (part * share.numerator + (share.denominator - 1)) // share.denominator
    place = jnp.maximum(place, 1)
    ordered = jnp.concatenate([ordered, jnp.full(1, jnp.inf, scores.dtype)])
    found = jnp.where(place <= size, ordered[jnp.clip(place - 1, 0, scores.size)], jnp.inf)
    return found * jnp.where(broken, jnp.nan, 1)  # A NaN reaches the gradient too.


@api("axis", "kind", "num_free", penalty=NONNEGATIVE)
def prediction_sets(
    logits: ArrayLike,
    threshold: ArrayLike,
    *,
    kind: Kind = "threshold",
    axis: int = -1,
    where: ArrayLike | None = None,
    penalty: ArrayLike = 0.0,
    num_free: int = 0,
) -> Array:
    r"""Selects the classes that are likely enough to be the label.

    .. math:: \{ i : s(z, i) \le t \}

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); not differentiable.
        threshold: t, of `conformal_threshold` with the same options, one number or one per
            slice.
        kind: the score s, as in `conformal_threshold`.
        axis: the one axis of the classes.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.
        penalty: as in `conformal_threshold`.
        num_free: as in `conformal_threshold`.

    Returns:
        Bools `[*shape]`: whether a class belongs to the set of its slice. The set is empty
        where even the likeliest class has a score above the threshold; under "aps" these are
        the most confident slices. A dropped class is in no set; a slice with a kept NaN, or
        with the threshold NaN, has an empty one.

    Raises:
        TypeError: `logits` is not real, `where` not bool, or `axis` not one int.
        ValueError: `kind` is none of its names, `penalty` or `num_free` comes without "raps",
            `threshold` or `where` does not broadcast, or `axis` is out of range.

    Example:
        >>> print(prediction_sets(jnp.log(jnp.array([0.6, 0.3, 0.1])), 0.95, kind="aps"))
        [ True  True False]

    Note:
        O(n), and a sort of the classes for "aps" and "raps".

    Reference:
        As `conformal_threshold`.
    """
    problem = prepare(logits, axis=axis, where=where)
    axis = resolve_one_axis(axis, problem.logits.ndim)
    scores = _scores(problem.logits, axis, kind, penalty, num_free)
    limit, _ = to_float(threshold, name="threshold")
    limit = broadcast(limit.astype(scores.dtype), scores.shape, name="threshold")
    return (scores <= limit) & (problem.logits != -jnp.inf)


def _scores(x: Array, axis: int, kind: str, penalty: ArrayLike, num_free: int) -> Array:
    """How little each class conforms to its slice."""
    if kind not in get_args(Kind):
        raise ValueError(f'`kind` must be "threshold", "aps" or "raps", got {kind!r}.')
    num_free = check_int(num_free, name="num_free", least=0)
    if kind != "raps" and not (is_static_zero(penalty) and num_free == 0):
        raise ValueError(f'`penalty` and `num_free` are for kind="raps", got {kind!r}.')
    log_probs = log_softmax(x, axis=axis)
    if kind == "threshold":
        return -log_probs
    order = jnp.argsort(-log_probs, axis, stable=True)
    descending = jnp.exp(jnp.take_along_axis(log_probs, order, axis))
    sums = jnp.minimum(jnp.cumsum(descending, axis), 1)
    if kind == "raps":
        factor = nan_outside(one_number(penalty, name="penalty"), 0).astype(x.dtype)
        beyond = lax.broadcasted_iota(x.dtype, x.shape, axis) + 1 - float(num_free)
        sums += jnp.where(beyond > 0, factor * beyond, 0)
    places = jnp.argsort(order, axis)
    return jnp.where(x == -jnp.inf, jnp.inf, jnp.take_along_axis(sums, places, axis))


@api("axis", temperature=POSITIVE)
def energy_score(
    logits: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
) -> Array:
    r"""Measures how little the logits speak for any class: large for inputs of no known one.

    .. math:: -T \log \sum_j m_j e^{z_j / T}

    Args:
        logits: scores z, `[*shape]`, real or -inf (dropped); differentiable.
        axis: axis, axes, or None for all, along which a slice runs.
        where: mask m, bool, broadcastable to `[*shape]`; True keeps an entry.
        temperature: T > 0, one number or one per slice; differentiable.

    Returns:
        One number per slice, in the dtype of `logits`; inf where nothing is kept.

    Raises:
        TypeError: `logits` is not real, `where` not bool, or `axis` not of integers.
        ValueError: `where` or `temperature` does not broadcast, `axis` is out of range, or
            `temperature` is a Python number that is not positive.

    Example:
        >>> print(energy_score(jnp.array([[0.0, 0.0], [5.0, 0.0]])))
        [-0.6931472 -5.0067153]

    Note:
        O(n); it is -`soft_value`. Unlike the largest probability, it sees a shift of all
        logits. Other scores are `-jnp.max(softmax(z), -1)`, `-jnp.max(z, -1)` and `entropy(z)`:
        which one is best depends on the data. Both modes, any order.

    Reference:
        Liu et al. (2020), Energy-based out-of-distribution detection.
    """
    return -soft_value(logits, axis=axis, where=where, temperature=temperature)
