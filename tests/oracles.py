"""Exact references, written from the definitions. Nothing here imports softjax.

There are two families. The functions of the first part work one slice at a time in
60-digit arithmetic (mpmath): slow, and exact for every float64 input. Those whose names
start with `fast_` work along the last axis in 80-bit extended precision, where every
rounding that matters is compensated; the tests check them against the first family, and
use them on slices of a thousand entries and more.

Values come back as `numpy.longdouble`, so that an error of a hundredth of a float64 ulp
is still seen.
"""

import fractions
import functools
import math

import mpmath
import numpy as np

mp = mpmath.mp.clone()
mp.dps = 60

INF, NAN = float("inf"), float("nan")

# Infinities are met on purpose; NumPy need not warn of them.
quiet = np.errstate(all="ignore")


# From mpmath to NumPy and back.


def to_longdouble(value):
    """The nearest 80-bit number (to two roundings) of an mpf, or of a float."""
    if isinstance(value, float) or not mp.isfinite(value):
        return np.longdouble(float(value))
    mantissa, exponent = mp.frexp(value)
    if exponent < -20_000:  # Far below the range.
        return np.longdouble(0)
    high = float(mantissa)
    low = float(mantissa - high)
    return np.ldexp(np.longdouble(high) + np.longdouble(low), exponent)


def _exact(value):
    """An mpf for a finite float; infinities and NaN stay Python floats."""
    value = float(value)
    return mp.mpf(value) if math.isfinite(value) else value


def normalise_axis(axis, ndim):
    """A sorted tuple of non-negative axes."""
    if axis is None:
        return tuple(range(ndim))
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    return tuple(sorted(a % ndim for a in axes))


def _rows(array, axes):
    """`[*shape]` to `[slices, n]`, and the way back."""
    ndim = array.ndim
    rest = tuple(a for a in range(ndim) if a not in axes)
    order = rest + axes
    moved = np.transpose(array, order)
    lead = [array.shape[a] for a in rest]
    n = math.prod(array.shape[a] for a in axes)

    def back(rows):
        return np.transpose(rows.reshape(moved.shape), np.argsort(order))

    return moved.reshape(math.prod(lead), n), back, tuple(lead)


def _per_slice(option, shape, axes):
    """An option, scalar or one per slice, as a flat list over the slices."""
    reduced = tuple(1 if a in axes else size for a, size in enumerate(shape))
    array = np.asarray(option).astype(np.float64)
    return np.broadcast_to(array, reduced).reshape(-1)


def _prepare(logits, axis, where):
    logits = np.asarray(logits).astype(np.float64)
    axes = normalise_axis(axis, logits.ndim)
    keep = logits != -np.inf  # NaN is kept.
    if where is not None:
        keep = keep & np.broadcast_to(np.asarray(where), logits.shape)
    return logits, keep, axes


@quiet
def _map(rule, dropped, logits, axis, where, **options):
    """Applies `rule(kept values, **options)` to every slice; dropped places get `dropped`."""
    logits, keep, axes = _prepare(logits, axis, where)
    if logits.size == 0:
        return logits.astype(np.longdouble)
    rows, back, _ = _rows(logits, axes)
    kept, _, _ = _rows(keep, axes)
    options = {k: _per_slice(v, logits.shape, axes) for k, v in options.items()}
    out = np.full(rows.shape, dropped, dtype=np.longdouble)
    for i, (row, mask) in enumerate(zip(rows, kept, strict=True)):
        values = [_exact(v) for v in row[mask]]
        if values:
            chosen = {k: _exact(v[i]) for k, v in options.items()}
            out[i, mask] = [to_longdouble(v) for v in rule(values, **chosen)]
    return back(out)


@quiet
def _reduce(rule, nothing, arrays, axis, where, keepdims):
    """Applies `rule(*kept values)` to every slice; a slice that keeps nothing is `nothing`."""
    _, keep, axes = _prepare(arrays[0], axis, where)
    rows = [_rows(np.asarray(a).astype(np.float64), axes)[0] for a in arrays]
    kept, _, lead = _rows(keep, axes)
    out = np.full(len(kept), nothing, dtype=np.longdouble)
    for i, mask in enumerate(kept):
        if mask.any():
            values = [[_exact(v) for v in array[i][mask]] for array in rows]
            out[i] = to_longdouble(rule(*values))
    out = out.reshape(lead)
    return np.expand_dims(out, axes) if keepdims else out


def _isnan(value):
    return isinstance(value, float) and math.isnan(value)


# Maps that share a mass of one.


def _shared(values, temperature):
    """The limits, as a list of weights; None where the ordinary definition applies."""
    if any(map(_isnan, values)) or _isnan(temperature):
        return [NAN] * len(values)
    top = max(values)
    if top == INF or temperature == 0:
        winners = [v == top for v in values]
    elif temperature == INF:
        winners = [True] * len(values)
    else:
        return None
    return [mp.mpf(w) / sum(winners) for w in winners]


def _log(value):
    if _isnan(value):
        return NAN
    return mp.log(value) if value > 0 else -INF


def _log_softmax_row(values, temperature, sink):
    has_sink = sink != -INF
    values = [*values, sink] if has_sink else values
    shared = _shared(values, temperature)
    if shared is not None:
        logs = [_log(v) for v in shared]
    else:
        first = max(range(len(values)), key=values.__getitem__)
        scores = [(v - values[first]) / temperature for v in values]
        # No cancellation: both terms are at most zero.
        others = mp.log1p(mp.fsum(mp.exp(s) for i, s in enumerate(scores) if i != first))
        logs = [s - others for s in scores]
    return logs[:-1] if has_sink else logs


def log_softmax(logits, *, axis=-1, where=None, temperature=1.0, sink=None):
    options = {"temperature": temperature, "sink": -INF if sink is None else sink}
    return _map(_log_softmax_row, -INF, logits, axis, where, **options)


def softmax(logits, *, axis=-1, where=None, temperature=1.0, sink=None):
    def rule(values, temperature, sink):
        logs = _log_softmax_row(values, temperature, sink)
        return [NAN if _isnan(v) else mp.exp(v) for v in logs]

    options = {"temperature": temperature, "sink": -INF if sink is None else sink}
    return _map(rule, 0.0, logits, axis, where, **options)


def _power_sum(scores, tau, alpha):
    exponent = 1 / (alpha - 1)
    return mp.fsum(((alpha - 1) * (s - tau)) ** exponent for s in scores if s > tau)


def _entmax_row(values, temperature, alpha):
    """Weights [(a - 1)(s - tau)]+ ^ (1 / (a - 1)); the support is found first, exactly."""
    if _isnan(alpha):
        return [NAN] * len(values)
    shared = _shared(values, temperature)
    if shared is not None:
        return shared
    if alpha == 1:
        return [mp.exp(v) for v in _log_softmax_row(values, temperature, -INF)]
    top = max(values)
    scores = [(v - top) / temperature for v in values]
    ordered = sorted(scores, reverse=True)
    # Entry k is in the support when the mass above it, at tau = s_k, is less than one.
    inside, outside = 1, len(ordered) + 1
    while outside - inside > 1:
        middle = (inside + outside) // 2
        if _power_sum(ordered[: middle - 1], ordered[middle - 1], alpha) < 1:
            inside = middle
        else:
            outside = middle
    support = ordered[:inside]
    if alpha == 2:
        tau = (mp.fsum(support) - 1) / inside
    elif alpha == mp.mpf("1.5"):
        mean = mp.fsum(support) / inside
        tau = mean - mp.sqrt((4 - mp.fsum((s - mean) ** 2 for s in support)) / inside)
    else:
        # Fewer entries, less mass: tau lies above that of the top one alone.
        low = -1 / (alpha - 1)
        high = support[-1] if inside == len(ordered) else min(support[-1], mp.mpf(0))
        tau = _root(lambda t: _power_sum(support, t, alpha) - 1, low, high)
    weight = lambda s: ((alpha - 1) * (s - tau)) ** (1 / (alpha - 1)) if s > tau else mp.mpf(0)
    in_support = {s: weight(s) for s in support}
    return [in_support.get(s, mp.mpf(0)) for s in scores]


def _root(fn, low, high):
    """The zero of a decreasing function, by bisection and then secants inside the bracket."""
    f_low, f_high = fn(low), fn(high)
    if f_low == 0 or low == high:
        return low
    if f_high == 0:
        return high
    for step in range(400):
        if step > 20 and step % 3:
            guess = high - f_high * (high - low) / (f_high - f_low)
            if not low < guess < high:
                guess = (low + high) / 2
        else:
            guess = (low + high) / 2
        f_guess = fn(guess)
        if f_guess == 0:
            return guess
        if f_guess > 0:
            low, f_low = guess, f_guess
        else:
            high, f_high = guess, f_guess
        if high - low <= mp.mpf(10) ** (-45) * max(abs(low), abs(high), mp.mpf(10) ** -30):
            break
    return (low + high) / 2


def entmax(logits, alpha=1.5, *, axis=-1, where=None, temperature=1.0):
    options = {"temperature": temperature, "alpha": alpha}
    return _map(_entmax_row, 0.0, logits, axis, where, **options)


def sparsemax(logits, *, axis=-1, where=None, temperature=1.0):
    return entmax(logits, 2.0, axis=axis, where=where, temperature=temperature)


def entmax15(logits, *, axis=-1, where=None, temperature=1.0):
    return entmax(logits, 1.5, axis=axis, where=where, temperature=temperature)


# Maps that share a mass of k.


def _unit(kind, t):
    if kind == "capped":
        return min(max(t, mp.mpf(0)), mp.mpf(1))
    if kind == "sigmoid":
        return 1 / (1 + mp.exp(-t))
    return mp.exp(t) / 2 if t <= 0 else 1 - mp.exp(-t) / 2


def _hard_top_k(values, k):
    """Ones for the k largest; those tied at the edge share what is left."""
    out = [mp.mpf(0)] * len(values)
    left = k
    for level in sorted(set(values), reverse=True):
        tied = [i for i, v in enumerate(values) if v == level]
        share = min(mp.mpf(1), left / len(tied))
        for i in tied:
            out[i] = share
        left -= share * len(tied)
    return out


def _soft_top_k_row(kind, values, temperature, k):
    n = len(values)
    if any(map(_isnan, [*values, temperature, k])) or not 0 <= k <= n:
        return [NAN] * n
    if k in (0, n):
        return [mp.mpf(k != 0)] * n
    if temperature == INF:
        return [mp.mpf(k) / n] * n
    if temperature == 0:
        return _hard_top_k(values, k)
    infinite = sum(v == INF for v in values)
    if infinite:
        rest = [v for v in values if v != INF]
        top = min(mp.mpf(1), k / infinite)
        below = iter(_soft_top_k_row(kind, rest, temperature, max(k - infinite, mp.mpf(0))))
        return [top if v == INF else next(below) for v in values]
    peak = max(values)
    scores = [(v - peak) / temperature for v in values]
    # At the lower end every weight is at least k / n, at the upper end at most k / n.
    width = (
        mp.mpf(2) if kind == "capped" else 2 + abs(mp.log(k)) + abs(mp.log(n - k)) + mp.log(n)
    )
    excess = lambda tau: mp.fsum(_unit(kind, s - tau) for s in scores) - k
    tau = _root(excess, min(scores) - width, max(scores) + width)
    if kind == "capped":  # Linear between two break points: solve the piece exactly.
        free = [s for s in scores if 0 < s - tau < 1]
        full = sum(s - tau >= 1 for s in scores)
        if free:
            tau = (mp.fsum(free) + full - k) / len(free)
    return [_unit(kind, s - tau) for s in scores]


def soft_top_k(logits, k, *, kind="capped", axis=-1, where=None, temperature=1.0):
    rule = lambda values, temperature, k: _soft_top_k_row(kind, values, temperature, k)
    return _map(rule, 0.0, logits, axis, where, temperature=temperature, k=k)


def segment_softmax(logits, segment_ids, *, num_segments, where=None, temperature=1.0):
    """Group by group, each a softmax; ids out of range are dropped."""
    logits = np.asarray(logits).astype(np.float64)
    ids = np.asarray(segment_ids)
    keep = np.ones(logits.shape, bool)
    if where is not None:
        keep = np.broadcast_to(np.asarray(where), logits.shape)
    out = np.zeros(logits.shape, np.longdouble)
    for segment in range(num_segments):
        members = ids == segment
        if members.any():
            options = {"where": keep[members], "temperature": temperature}
            out[members] = softmax(logits[members], axis=0, **options)
    return out


# Reductions.


def _logsumexp_row(values, weights):
    pairs = [(v, w) for v, w in zip(values, weights, strict=True) if w != 0]
    if any(_isnan(v) or _isnan(w) for v, w in pairs):
        return NAN
    infinite = [w for v, w in pairs if v == INF]
    if infinite:
        return INF if min(infinite) > 0 else NAN
    if not pairs:
        return -INF
    values, weights = zip(*pairs, strict=True)
    peak = max(values)
    pairs = zip(values, weights, strict=True)
    total = mp.fsum(w * mp.exp(v - peak) for v, w in pairs)
    if total < 0:
        return NAN
    return peak + mp.log(total) if total > 0 else -INF


def logsumexp(logits, *, axis=None, where=None, weights=None, keepdims=False):
    logits = np.asarray(logits).astype(np.float64)
    weights = np.broadcast_to(np.asarray(1.0 if weights is None else weights), logits.shape)
    return _reduce(_logsumexp_row, -INF, (logits, weights), axis, where, keepdims)


def segment_logsumexp(logits, segment_ids, *, num_segments, where=None):
    """Group by group, each a logsumexp; ids out of range are dropped."""
    logits = np.asarray(logits).astype(np.float64)
    keep = np.broadcast_to(True if where is None else np.asarray(where), logits.shape)
    groups = [np.asarray(segment_ids) == segment for segment in range(num_segments)]
    rows = [logsumexp(logits[g], axis=0, where=keep[g]) for g in groups]
    return np.stack(rows) if rows else np.zeros((0, *logits.shape[1:]))


def logmeanexp(logits, *, axis=None, where=None, keepdims=False):
    """Divides by the number of entries that are kept: -inf does not count."""
    logits, mask, axes = _prepare(logits, axis, where)
    count = mask.sum(axes, keepdims=keepdims)
    total = logsumexp(logits, axis=axis, where=where, keepdims=keepdims)
    flat = [
        -INF if t == -INF else to_longdouble(_from_longdouble(t) - mp.log(int(c)))
        for t, c in zip(np.ravel(total), np.ravel(count), strict=True)
    ]
    return np.array(flat, np.longdouble).reshape(np.shape(total))


def _from_longdouble(value):
    if not np.isfinite(value):
        return float(value)
    high = float(value)
    return mp.mpf(high) + mp.mpf(float(value - np.longdouble(high)))


def mellowmax(values, *, omega, axis=-1, where=None):
    values = np.asarray(values).astype(np.float64)
    axes = normalise_axis(axis, values.ndim)
    omega = iter(_per_slice(omega, values.shape, axes))

    def rule(kept):
        w = _exact(next(omega))
        if any(map(_isnan, kept)):
            return NAN
        if w in (INF, -INF):
            return max(kept) if w > 0 else min(kept)
        if w == 0:
            return mp.fsum(kept) / len(kept)
        peak = max(kept) if w > 0 else min(kept)
        mean = mp.fsum(mp.exp(w * (v - peak)) for v in kept) / len(kept)
        return peak + mp.log(mean) / w

    return _reduce(rule, -INF, (values,), axis, where, False)


# Statistics.


def _entropy_row(values):
    logs = _log_softmax_row(values, mp.mpf(1), -INF)
    if any(map(_isnan, logs)):
        return NAN
    return -mp.fsum(mp.exp(v) * v for v in logs if v != -INF)


def entropy(logits, *, axis=-1, where=None):
    return _reduce(_entropy_row, 0.0, (logits,), axis, where, False)


def kl_divergence(p_logits, q_logits, *, axis=-1, where=None, temperature=1.0):
    """Where only p is dropped, q still counts in its own normaliser."""

    def rule(p_values, q_values, temperature):
        if any(map(_isnan, p_values + q_values)):
            return NAN
        logs_p = _log_softmax_row(p_values, temperature, -INF)
        kept = [v for v in q_values if v != -INF]
        if not kept:
            return INF
        logs_q = iter(_log_softmax_row(kept, temperature, -INF))
        logs_q = [next(logs_q) if v != -INF else -INF for v in q_values]
        terms = [(a, b) for a, b in zip(logs_p, logs_q, strict=True) if a != -INF]
        if any(b == -INF for _, b in terms):
            return INF
        return mp.fsum(mp.exp(a) * (a - b) for a, b in terms)

    p_logits = np.asarray(p_logits).astype(np.float64)
    q_logits = np.asarray(q_logits).astype(np.float64)
    keep = np.ones(p_logits.shape, bool) if where is None else where
    keep = np.broadcast_to(np.asarray(keep), p_logits.shape)
    axes = normalise_axis(axis, p_logits.ndim)
    rows_p, _, lead = _rows(p_logits, axes)
    rows_q, _, _ = _rows(q_logits, axes)
    kept, _, _ = _rows(keep, axes)
    temperatures = _per_slice(temperature, p_logits.shape, axes)
    out = np.zeros(len(kept), np.longdouble)
    for i, mask in enumerate(kept):
        p_values = [_exact(v) for v in rows_p[i][mask]]
        q_values = [_exact(v) for v in rows_q[i][mask]]
        if any(v != -INF for v in p_values):
            out[i] = to_longdouble(rule(p_values, q_values, _exact(temperatures[i])))
    return out.reshape(lead)


def jensen_shannon_divergence(p_logits, q_logits, *, weight=0.5, axis=-1, where=None):
    """0 where either keeps nothing."""

    def probs(values):
        if not any(v != -INF for v in values):
            return None
        kept = iter(_log_softmax_row([v for v in values if v != -INF], mp.mpf(1), -INF))
        return [mp.exp(next(kept)) if v != -INF else mp.mpf(0) for v in values]

    def rule(p_values, q_values, w):
        if any(map(_isnan, p_values + q_values)):
            return NAN
        p, q = probs(p_values), probs(q_values)
        if p is None or q is None:
            return mp.mpf(0)
        terms = []
        for a, b in zip(p, q, strict=True):
            m = w * a + (1 - w) * b
            terms += [
                share * x * mp.log(x / m) for share, x in ((w, a), (1 - w, b)) if share * x
            ]
        return mp.fsum(terms)

    p_logits = np.asarray(p_logits).astype(np.float64)
    q_logits = np.asarray(q_logits).astype(np.float64)
    keep = np.ones(p_logits.shape, bool) if where is None else where
    keep = np.broadcast_to(np.asarray(keep), p_logits.shape)
    axes = normalise_axis(axis, p_logits.ndim)
    rows_p, _, lead = _rows(p_logits, axes)
    rows_q, _, _ = _rows(q_logits, axes)
    kept, _, _ = _rows(keep, axes)
    weights = _per_slice(weight, p_logits.shape, axes)
    out = np.zeros(len(kept), np.longdouble)
    for i, mask in enumerate(kept):
        p_values = [_exact(v) for v in rows_p[i][mask]]
        q_values = [_exact(v) for v in rows_q[i][mask]]
        out[i] = to_longdouble(rule(p_values, q_values, _exact(weights[i])))
    return out.reshape(lead)


def log_prob(logits, labels, *, axis=-1, where=None):
    """Labels `[*shape without axis]`; out of range gives NaN."""
    logs = np.moveaxis(log_softmax(logits, axis=axis, where=where), axis, -1)
    labels = np.asarray(labels)
    out = np.full(labels.shape, np.nan, np.longdouble)
    for index in np.ndindex(labels.shape):
        if 0 <= labels[index] < logs.shape[-1]:
            out[index] = logs[index][labels[index]]
    return out


# Losses.


@quiet
def _each_label(rule, logits, labels, axis, where=None, ignore_index=None, **options):
    """`rule(kept logits by class, label, **options)` for every label that is one."""
    logits, keep, _ = _prepare(logits, axis, where)
    rows = np.moveaxis(np.where(keep, logits, -np.inf), axis, -1)
    labels = np.broadcast_to(np.asarray(labels), rows.shape[:-1])
    options = {
        k: np.broadcast_to(np.asarray(v).astype(np.float64), labels.shape)
        for k, v in options.items()
    }
    out = np.zeros(labels.shape, np.longdouble)
    for i in np.ndindex(labels.shape):
        label = int(labels[i])
        if label == ignore_index:
            continue
        kept = {j: _exact(v) for j, v in enumerate(rows[i]) if v != -np.inf}
        if not 0 <= label < rows.shape[-1]:
            out[i] = np.nan
        elif label not in kept:
            out[i] = np.inf
        elif any(map(_isnan, kept.values())):
            out[i] = np.nan
        else:
            out[i] = to_longdouble(
                rule(kept, label, **{k: _exact(v[i]) for k, v in options.items()})
            )
    return out


def _logs(kept):
    logs = _log_softmax_row(list(kept.values()), mp.mpf(1), -INF)
    return dict(zip(kept, logs, strict=True))


def cross_entropy(
    logits,
    labels,
    *,
    axis=-1,
    where=None,
    ignore_index=None,
    label_smoothing=0.0,
    z_loss=0.0,
    class_weights=None,
):
    weights = None if class_weights is None else np.asarray(class_weights).astype(np.float64)

    def rule(kept, label, epsilon, factor):
        weight = lambda j: mp.mpf(1) if weights is None else _exact(weights[j])
        logs = _logs(kept)
        loss = (1 - epsilon) * weight(label) * -logs[label]
        if epsilon:
            even = mp.fsum(weight(j) * -log for j, log in logs.items()) / len(logs)
            loss += epsilon * even
        if factor:
            total = _logsumexp_row(list(kept.values()), [mp.mpf(1)] * len(kept))
            loss += factor * total**2
        return loss

    options = {"epsilon": label_smoothing, "factor": z_loss}
    return _each_label(rule, logits, labels, axis, where, ignore_index, **options)


@quiet
def soft_cross_entropy(logits, targets, *, axis=-1, where=None):
    """A target on an entry that `where` drops is no target; on one that -inf drops, inf."""
    logits = np.asarray(logits).astype(np.float64)
    targets = np.broadcast_to(np.asarray(targets).astype(np.float64), logits.shape)
    keep = np.ones(logits.shape, bool) if where is None else where
    keep = np.broadcast_to(np.asarray(keep), logits.shape)
    axes = normalise_axis(axis, logits.ndim)
    rows, _, lead = _rows(logits, axes)
    weights, kept = _rows(targets, axes)[0], _rows(keep, axes)[0]
    out = np.zeros(len(rows), np.longdouble)
    for i, (row, mask) in enumerate(zip(rows, kept, strict=True)):
        live = mask & (row != -np.inf)
        values = [_exact(v) for v in row[live]]
        if (weights[i][mask & ~live] > 0).any():
            out[i] = np.inf
        elif values:
            logs = _log_softmax_row(values, mp.mpf(1), -INF)
            pairs = zip(weights[i][live], logs, strict=True)
            terms = [-_exact(t) * log for t, log in pairs if t != 0]
            out[i] = NAN if any(map(_isnan, logs)) else to_longdouble(mp.fsum(terms))
    return out.reshape(lead)


def distillation_loss(student_logits, teacher_logits, *, temperature, axis=-1):
    student = np.asarray(student_logits).astype(np.float64)
    axes = normalise_axis(axis, student.ndim)
    row = kl_divergence(teacher_logits, student, axis=axis, temperature=temperature)
    factor = _per_slice(temperature, student.shape, axes).reshape(row.shape)
    return row * factor.astype(np.longdouble) ** 2


def focal_loss(logits, labels, *, gamma, axis=-1):
    def rule(kept, label, gamma):
        surprise = -_logs(kept)[label]
        missing = -mp.expm1(-surprise)
        return missing**gamma * surprise if gamma else surprise

    return _each_label(rule, logits, labels, axis, gamma=gamma)


def sigmoid_focal_loss(logits, targets, *, gamma=2.0, alpha=None):
    """One loss per logit, from the definition."""

    def rule(z, t, gamma, alpha=None):
        p = 1 / (1 + mp.exp(-z))
        no = 1 / (1 + mp.exp(z))
        nll = -(t * mp.log(p) if t else 0) - ((1 - t) * mp.log(no) if t != 1 else 0)
        weight = 1 if alpha is None else t * alpha + (1 - t) * (1 - alpha)
        return weight * (t * no + (1 - t) * p) ** gamma * nll

    arrays = [logits, targets, gamma] + ([] if alpha is None else [alpha])
    arrays = np.broadcast_arrays(*(np.asarray(x).astype(np.float64) for x in arrays))
    rows = zip(*(x.ravel() for x in arrays), strict=True)
    out = [rule(*map(_exact, row)) for row in rows]
    return np.array([to_longdouble(x) for x in out], np.longdouble).reshape(arrays[0].shape)


def sparsemax_loss(logits, labels, *, axis=-1):
    """Half the squared distance from z to the label, less that to its projection."""

    def rule(kept, label):
        probs = _entmax_row(list(kept.values()), mp.mpf(1), mp.mpf(2))
        to_label = mp.fsum(((j == label) - z) ** 2 for j, z in kept.items())
        to_probs = mp.fsum((p - z) ** 2 for p, z in zip(probs, kept.values(), strict=True))
        return (to_label - to_probs) / 2

    return _each_label(rule, logits, labels, axis)


def entmax_loss(logits, labels, alpha=1.5, *, axis=-1):
    """<p - e_y, z> + H_alpha(p)."""

    def rule(kept, label, alpha):
        probs = _entmax_row(list(kept.values()), mp.mpf(1), alpha)
        if alpha == 1:
            terms = [-p * mp.log(p) for p in probs if p > 0]
        else:
            terms = [(p - p**alpha) / (alpha * (alpha - 1)) for p in probs if p > 0]
        score = mp.fsum(p * z for p, z in zip(probs, kept.values(), strict=True))
        return score - kept[label] + mp.fsum(terms)

    alpha = np.asarray(alpha)
    if alpha.ndim == np.ndim(logits):  # One a slice, with size 1 along the axis.
        alpha = np.squeeze(alpha, axis)
    return _each_label(rule, logits, labels, axis, alpha=alpha)


@quiet
def mean_loss(
    losses, labels=None, *, ignore_index=None, class_weights=None, example_weights=None
):
    losses = np.asarray(losses).astype(np.float64)
    shares = np.ones(losses.shape) if example_weights is None else example_weights
    shares = np.broadcast_to(np.asarray(shares).astype(np.float64), losses.shape)
    total = mass = mp.mpf(0)
    for i in np.ndindex(losses.shape):
        label = None if labels is None else int(np.asarray(labels)[i])
        if shares[i] == 0 or (label is not None and label == ignore_index):
            continue
        if not np.isfinite(losses[i]):
            return np.longdouble(losses[i])
        weight = 1.0 if class_weights is None else float(np.asarray(class_weights)[label])
        total += _exact(shares[i]) * _exact(losses[i])
        mass += _exact(shares[i]) * _exact(weight)
    return to_longdouble(total / mass if mass else mp.mpf(0))


def class_balanced_weights(counts, *, beta):
    counts = [_exact(c) for c in np.asarray(counts).astype(np.float64)]
    beta = _exact(beta)
    effective = lambda c: c if beta == 1 else (1 - beta**c) / (1 - beta)
    inverses = [1 / effective(c) if c > 0 else mp.mpf(0) for c in counts]
    seen = sum(c > 0 for c in counts)
    total = mp.fsum(inverses)
    scale = seen / total if seen else mp.mpf(0)
    return np.array([to_longdouble(scale * v) for v in inverses], np.longdouble)


def logit_adjustment(counts, *, scale=1.0):
    counts = [_exact(c) for c in np.asarray(counts).astype(np.float64)]
    total, scale = mp.fsum(counts), _exact(scale)
    logs = [scale * mp.log(c / total) if c > 0 else -mp.inf for c in counts]
    return np.array([to_longdouble(v) for v in logs], np.longdouble)


# Score transforms.


@quiet
def adjusted_scores(logits, adjustment, *, axis=-1):
    rows = np.moveaxis(np.asarray(logits).astype(np.longdouble), axis, -1)
    shifts = np.asarray(adjustment).astype(np.longdouble)
    dropped = (rows == -np.inf) | (shifts == -np.inf)
    return np.moveaxis(np.where(dropped, -np.inf, rows + shifts), -1, axis)


@quiet
def soft_cap(logits, cap):
    logits = np.asarray(logits).astype(np.longdouble)
    cap = np.asarray(cap).astype(np.longdouble)
    return np.where(logits == -np.inf, -np.inf, cap * np.tanh(logits / cap))


@quiet
def scalable_scores(logits, scale=1.0, *, axis=-1, where=None):
    values, keep, axes = _prepare(logits, axis, where)
    count = keep.sum(axes, keepdims=True).astype(np.longdouble)
    factor = np.asarray(scale).astype(np.longdouble) * np.log(np.maximum(count, 1))
    finite = np.where(values == -np.inf, 0, values).astype(np.longdouble)
    return np.where(values == -np.inf, -np.inf, factor * finite)


def sigsoftmax_scores(logits):
    return np.vectorize(_sigsoftmax_score, otypes=[np.longdouble])(np.asarray(logits, float))


def _sigsoftmax_score(value):
    if not math.isfinite(value):
        return np.longdouble(value)
    x = mp.mpf(value)
    return to_longdouble(2 * x - mp.log1p(mp.exp(x)))


def taylor_scores(logits):
    return np.vectorize(_taylor_score, otypes=[np.longdouble])(np.asarray(logits, float))


def _taylor_score(value):
    if not math.isfinite(value):
        return np.longdouble(value)
    x = mp.mpf(value)
    return to_longdouble(mp.log1p(x + x * x / 2))


@quiet
def _filter(rule, logits, axis, **options):
    """Keeps what `rule(kept values, **options)` marks; the rest becomes -inf."""
    values, keep, axes = _prepare(logits, axis, None)
    rows, back, _ = _rows(values, axes)
    kept, _, _ = _rows(keep, axes)
    options = {k: _per_slice(v, values.shape, axes) for k, v in options.items()}
    out = np.full(rows.shape, -np.inf)
    for i, (row, mask) in enumerate(zip(rows, kept, strict=True)):
        if mask.any():
            chosen = {k: float(v[i]) for k, v in options.items()}
            marks = rule([mp.mpf(v) for v in row[mask]], **chosen)
            out[i, mask] = np.where(marks, row[mask], -np.inf)
    return back(out)


def _smallest_set(costs, probs, mass):
    """Marks the entries of least cost that hold the mass, ties with the last one too."""
    if mass >= 1:
        return [True] * len(costs)
    total, last = mp.mpf(0), None
    for cost, prob in sorted(zip(costs, probs, strict=True)):
        total, last = total + prob, cost
        if total >= mass:
            break
    return [cost <= last for cost in costs]


def _at_least(marks, costs, least):
    """The marks, and the `least` entries of least cost, ties with the last one too."""
    edge = sorted(costs)[min(least, len(costs)) - 1]
    return [mark or cost <= edge for mark, cost in zip(marks, costs, strict=True)]


def top_k_filter(logits, k, *, axis=-1):
    def rule(values, k):
        edge = sorted(values, reverse=True)[min(int(k), len(values)) - 1]
        return [v >= edge for v in values]

    return _filter(rule, logits, axis, k=k)


def top_p_filter(logits, p, *, axis=-1, min_tokens_to_keep=1):
    def rule(values, p):
        probs = [mp.exp(v) for v in _log_softmax_row(values, mp.mpf(1), -INF)]
        costs = [-v for v in values]
        return _at_least(_smallest_set(costs, probs, p), costs, min_tokens_to_keep)

    return _filter(rule, logits, axis, p=p)


def min_p_filter(logits, min_p, *, axis=-1, min_tokens_to_keep=1):
    def rule(values, min_p):
        peak = max(values)
        marks = [mp.exp(v - peak) >= min_p for v in values]
        return _at_least(marks, [-v for v in values], min_tokens_to_keep)

    return _filter(rule, logits, axis, min_p=min_p)


def typical_filter(logits, mass, *, axis=-1, min_tokens_to_keep=1):
    def rule(values, mass):
        logs = _log_softmax_row(values, mp.mpf(1), -INF)
        entropy = -mp.fsum(mp.exp(v) * v for v in logs)
        costs = [abs(-v - entropy) for v in logs]
        return _at_least(
            _smallest_set(costs, map(mp.exp, logs), mass), costs, min_tokens_to_keep
        )

    return _filter(rule, logits, axis, mass=mass)


def epsilon_filter(logits, epsilon, *, axis=-1, min_tokens_to_keep=1):
    def rule(values, epsilon):
        logs = _log_softmax_row(values, mp.mpf(1), -INF)
        marks = [mp.exp(v) >= epsilon for v in logs]
        return _at_least(marks, [-v for v in values], min_tokens_to_keep)

    return _filter(rule, logits, axis, epsilon=epsilon)


def eta_filter(logits, epsilon, *, axis=-1, min_tokens_to_keep=1):
    def rule(values, epsilon):
        logs = _log_softmax_row(values, mp.mpf(1), -INF)
        entropy = -mp.fsum(mp.exp(v) * v for v in logs)
        bound = min(mp.mpf(epsilon), mp.sqrt(epsilon) * mp.exp(-entropy))
        marks = [mp.exp(v) >= bound for v in logs]
        return _at_least(marks, [-v for v in values], min_tokens_to_keep)

    return _filter(rule, logits, axis, epsilon=epsilon)


def top_n_sigma_filter(logits, n, *, axis=-1, min_tokens_to_keep=1):
    def rule(values, n):
        mean = mp.fsum(values) / len(values)
        sigma = mp.sqrt(mp.fsum((v - mean) ** 2 for v in values) / len(values))
        marks = [v >= max(values) - n * sigma for v in values]
        return _at_least(marks, [-v for v in values], min_tokens_to_keep)

    return _filter(rule, logits, axis, n=n)


# The fast family: the last axis, in 80-bit arithmetic.


def _two_diff(a, b):
    """a - b rounded, and what the rounding lost."""
    d = a - b
    v = d - a
    return d, (a - (d - v)) - (b + v)


def _two_prod(a, b):
    """a * b rounded, and what the rounding lost (Dekker, 64-bit significands)."""
    split = np.longdouble(2**32 + 1)
    a_high = split * a - (split * a - a)
    b_high = split * b - (split * b - b)
    a_low, b_low = a - a_high, b - b_high
    p = a * b
    return p, ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low


def _scores(logits, where, temperature):
    """Centred scores as an unevaluated sum; -inf where dropped."""
    logits = np.asarray(logits).astype(np.longdouble)
    temperature = np.asarray(temperature).astype(np.float64).astype(np.longdouble)
    keep = logits != -np.inf
    if where is not None:
        keep = keep & np.broadcast_to(np.asarray(where), logits.shape)
    peak = np.max(np.where(keep, logits, -np.inf), -1, keepdims=True)
    d, d_low = _two_diff(np.where(keep, logits, peak), peak)
    s = d / temperature
    p, p_low = _two_prod(s, np.broadcast_to(temperature, s.shape))
    s_low = (((d - p) - p_low) + d_low) / temperature
    return np.where(keep, s, -np.inf), s_low, keep, peak


def _exp(s, s_low):
    return np.where(s == -np.inf, 0, np.exp(s) * (1 + s_low))


def _others(s, s_low):
    """The sum over all entries but one of the largest."""
    weights = _exp(s, s_low)
    first = np.argmax(s, -1, keepdims=True)
    np.put_along_axis(weights, first, np.longdouble(0), -1)
    return np.sum(weights, -1, keepdims=True)


@quiet
def fast_log_softmax(logits, *, where=None, temperature=1.0):
    s, s_low, keep, _ = _scores(logits, where, temperature)
    logs = (s - np.log1p(_others(s, s_low))) + s_low
    return np.where(keep, logs, -np.inf)


@quiet
def fast_softmax(logits, *, where=None, temperature=1.0):
    s, s_low, _, _ = _scores(logits, where, temperature)
    return _exp(s, s_low) / (1 + _others(s, s_low))


@quiet
def fast_logsumexp(logits, *, where=None):
    s, s_low, _, peak = _scores(logits, where, 1.0)
    return (peak + np.log1p(_others(s, s_low)))[..., 0]


@quiet
def fast_cross_entropy(logits, labels, *, where=None):
    """The loss, and minus its derivative in the label's logit: the sum of the other weights."""
    labels = np.asarray(labels)[..., None]
    logs = fast_log_softmax(logits, where=where)
    others = fast_softmax(logits, where=where)
    np.put_along_axis(others, labels, np.longdouble(0), -1)
    return -np.take_along_axis(logs, labels, -1)[..., 0], np.sum(others, -1)


@quiet
def fast_entmax(logits, alpha, *, where=None, temperature=1.0):
    s, s_low, keep, _ = _scores(logits, where, temperature)
    s = np.where(keep, s + s_low, -np.inf)
    out = np.zeros(s.shape, np.longdouble)
    for index in np.ndindex(s.shape[:-1]):
        out[index] = _fast_entmax_row(s[index], np.longdouble(alpha))
    return out


def _fast_entmax_row(s, alpha):
    power = lambda t: np.maximum((alpha - 1) * t, 0) ** (1 / (alpha - 1))
    # Nothing below max - 1 / (a - 1) can be in the support.
    ordered = np.sort(s[s > -1 / (alpha - 1)])[::-1]
    inside, outside = 1, len(ordered) + 1
    while outside - inside > 1:
        middle = (inside + outside) // 2
        if np.sum(power(ordered[: middle - 1] - ordered[middle - 1])) < 1:
            inside = middle
        else:
            outside = middle
    support = ordered[:inside]
    if alpha == 2:
        tau = (np.sum(support) - 1) / inside
    elif alpha == 1.5:
        mean = np.sum(support) / inside
        tau = mean - np.sqrt((4 - np.sum((support - mean) ** 2)) / inside)
    else:
        low, high = -1 / (alpha - 1), support[-1]
        for _ in range(70):
            tau = (low + high) / 2
            if np.sum(power(support - tau)) > 1:
                low = tau
            else:
                high = tau
        tau = (low + high) / 2
    return np.where(s >= support[-1], power(s - tau), 0)


def linear_cross_entropy(features, weights, labels, bias, temperature):
    return cross_entropy(_linear_scores(features, weights, bias, temperature), labels)


def linear_statistics(features, weights, labels, bias, temperature):
    """Log-sum-exp, entropy and log-probability, stacked."""
    scores = _linear_scores(features, weights, bias, temperature)
    return np.stack([logsumexp(scores, axis=-1), entropy(scores), log_prob(scores, labels)])


def _linear_scores(features, weights, bias, temperature):
    """Rounded once."""
    wide = [np.asarray(x).astype(np.longdouble) for x in (features, weights, bias, temperature)]
    features, weights, bias, temperature = wide
    scores = (features @ weights.T + bias[None]) / temperature[:, None]
    return scores.astype(np.float64)


def linear_distillation_loss(features, weights, teacher, teacher_weights, bias, temperature):
    ones = np.ones(len(features))
    student = _linear_scores(features, weights, bias, ones)
    taught = _linear_scores(teacher, teacher_weights, np.zeros(len(bias)), ones)
    return distillation_loss(student, taught, temperature=np.asarray(temperature)[:, None])


def linear_jensen_shannon_divergence(
    features, weights, teacher, teacher_weights, bias, temperature, weight
):
    ones, temperature = np.ones(len(features)), np.asarray(temperature, np.float64)[:, None]
    student = _linear_scores(features, weights, bias, ones)
    taught = _linear_scores(teacher, teacher_weights, np.zeros(len(bias)), ones)
    weight = np.asarray(weight, np.float64)[:, None]
    return jensen_shannon_divergence(taught / temperature, student / temperature, weight=weight)


def adaptive_log_softmax(features, head, tails, bias, labels):
    ones = np.ones(len(features))
    frequent = len(head) - len(tails)
    logs = log_softmax(_linear_scores(features, head, bias, ones))
    columns = [logs[:, :frequent]]
    for i, (projection, weights) in enumerate(tails):
        wide = [np.asarray(x).astype(np.longdouble) for x in (features, projection, weights)]
        scores = (wide[0] @ wide[1].T @ wide[2].T).astype(np.float64)
        columns.append(logs[:, frequent + i, None] + log_softmax(scores))
    return np.concatenate(columns, 1)[np.arange(len(features)), np.asarray(labels)]


def sampled_cross_entropy(features, weights, labels, drawn, bias, temperature):
    """The definition, for classes that have been drawn."""
    scores = _linear_scores(features, weights, bias, temperature)
    num_classes, drawn = len(weights), np.asarray(drawn)
    expected = [len(drawn) * np.log1p(1 / (c + 1.0)) / np.log1p(num_classes) for c in drawn]
    losses = []
    for row, label in zip(scores, np.asarray(labels), strict=True):
        others = [
            row[c] - np.log(e) for c, e in zip(drawn, expected, strict=True) if c != label
        ]
        losses.append(cross_entropy(np.array([row[label], *others]), 0))
    return np.array(losses)


def info_nce(queries, keys, *, temperature, symmetric=True):
    own = np.arange(len(queries))
    scores = _linear_scores(
        queries, keys, np.zeros(len(keys)), np.full(len(queries), temperature)
    )
    sides = (scores, scores.T) if symmetric else (scores,)
    return np.mean([np.mean(cross_entropy(side, own)) for side in sides])


def siglip_loss(queries, keys, *, temperature, bias):
    scores = _linear_scores(
        queries, keys, np.zeros(len(keys)), np.full(len(queries), temperature)
    )
    signs = 2 * np.eye(len(queries)) - 1
    exponents = (-signs * (scores + np.asarray(bias, np.float64))).astype(np.longdouble)
    return np.sum(np.log1p(np.exp(exponents))) / len(queries)


# Sampling and decoding.


@quiet
def ranking_log_prob(logits, indices, *, where=None):
    """Of each draw given those before it, along the last axis; float64 serves."""
    logits, keep, _ = _prepare(logits, -1, where)
    indices = np.asarray(indices)
    out = np.zeros(indices.shape, np.longdouble)
    for row in np.ndindex(indices.shape[:-1]):
        left = np.where(keep[row], logits[row], -INF).astype(np.longdouble)
        for j, i in enumerate(indices[row]):
            if i == -1:
                continue
            if left[i] == -INF:
                out[row][j] = -INF
                continue
            score, left[i] = left[i], -INF
            out[row][j] = -np.log1p(np.sum(np.exp(left - score)))
    return out


def gumbel_given_argmax(logits, labels, noise):
    """The noise at the label becomes that of the largest; the others are cut off at it."""
    logits, noise = (np.asarray(a).astype(np.longdouble) for a in (logits, noise))
    labels = np.asarray(labels)[..., None]
    largest = np.log(np.sum(np.exp(logits), -1, keepdims=True))
    top = largest + np.take_along_axis(noise, labels, -1)
    others = -np.log(np.exp(-top) + np.exp(-(logits + noise)))
    return np.where(np.arange(logits.shape[-1]) == labels, top, others)


@quiet
def relaxed_log_density(logits, log_samples, temperature, where):
    """Of the concrete distribution (Maddison et al., 2017), as a product, one a row."""
    logits, log_y = (np.asarray(a).astype(np.longdouble) for a in (logits, log_samples))
    out = np.zeros(len(logits), np.longdouble)
    for row, keep in enumerate(np.asarray(where)):
        z, log_y_row = logits[row][keep], log_y[row][keep]
        t, n = np.longdouble(np.asarray(temperature)[row, 0]), len(z)
        total = np.sum(np.exp(z - t * log_y_row))
        terms = z - (t + 1) * log_y_row - np.log(total)
        out[row] = math.lgamma(n) + (n - 1) * np.log(t) + np.sum(terms)
    return out


@quiet
def repetition_penalty(logits, tokens, penalty=1.0, *, presence=0.0, frequency=0.0):
    logits = np.asarray(logits).astype(np.longdouble)
    options = (np.asarray(o).astype(np.longdouble) for o in (penalty, presence, frequency))
    penalty, presence, frequency = (np.broadcast_to(o, logits.shape) for o in options)
    tokens = np.broadcast_to(tokens, (*logits.shape[:-1], np.shape(tokens)[-1]))
    out = logits.copy()
    for place in np.ndindex(logits.shape):
        count = int(np.sum(tokens[place[:-1]] == place[-1]))
        z = logits[place]
        if count and z > -INF:
            bent = z / penalty[place] if z > 0 else z * penalty[place]
            out[place] = bent - presence[place] - frequency[place] * count
    return out


# Policies.


def _policy_row(values, temperature, epsilon):
    """Probabilities of a Boltzmann policy mixed with the uniform one."""
    logs = _log_softmax_row(values, temperature, -INF)
    if any(map(_isnan, logs)) or not 0 <= epsilon <= 1:
        return [NAN] * len(values)
    share = epsilon / len(values)
    return [(1 - epsilon) * mp.exp(log) + share for log in logs]


def policy_probs(values, *, temperature=1.0, epsilon=0.0, axis=-1, where=None):
    options = {"temperature": temperature, "epsilon": epsilon}
    return _map(_policy_row, 0.0, values, axis, where, **options)


def policy_log_probs(values, *, temperature=1.0, epsilon=0.0, axis=-1, where=None):
    """Of all actions."""
    rule = lambda *args, **options: [_log(p) for p in _policy_row(*args, **options)]
    options = {"temperature": temperature, "epsilon": epsilon}
    return _map(rule, -INF, values, axis, where, **options)


def policy_log_prob(values, actions, *, axis=-1, **options):
    logs = np.moveaxis(policy_log_probs(values, axis=axis, **options), axis, -1)
    actions = np.asarray(actions)
    out = np.full(actions.shape, np.nan, np.longdouble)
    for index in np.ndindex(actions.shape):
        if 0 <= actions[index] < logs.shape[-1]:
            out[index] = logs[index][actions[index]]
        elif actions[index] == -1 and (logs[index] == -np.inf).all():
            out[index] = -np.inf
    return out


def _with_options(rule, nothing, values, axis, where, keepdims=False, **options):
    """`rule(legal values, **options of the slice)` for every slice that has a legal value."""
    values = np.asarray(values).astype(np.float64)
    axes = normalise_axis(axis, values.ndim)
    lists = {k: _per_slice(v, values.shape, axes) for k, v in options.items()}
    _, keep, _ = _prepare(values, axis, where)
    rows, _, lead = _rows(values, axes)
    out = np.full(len(rows), nothing, np.longdouble)
    for i, (row, mask) in enumerate(zip(rows, _rows(keep, axes)[0], strict=True)):
        if mask.any():
            legal = [_exact(v) for v in row[mask]]
            out[i] = to_longdouble(rule(legal, **{k: _exact(v[i]) for k, v in lists.items()}))
    out = out.reshape(lead)
    return np.expand_dims(out, axes) if keepdims else out


def policy_entropy(values, *, temperature=1.0, epsilon=0.0, axis=-1, where=None):
    def rule(legal, temperature, epsilon):
        probs = _policy_row(legal, temperature, epsilon)
        return NAN if any(map(_isnan, probs)) else -mp.fsum(p * mp.log(p) for p in probs if p)

    options = {"temperature": temperature, "epsilon": epsilon}
    return _with_options(rule, 0.0, values, axis, where, **options)


def policy_gradient_loss(
    logits, actions, advantages, *, temperature=1.0, entropy_cost=0.0, where=None
):
    options = {"temperature": temperature, "where": where}
    logs = policy_log_prob(logits, actions, **options)
    advantages = np.broadcast_to(np.asarray(advantages).astype(np.longdouble), logs.shape)
    with np.errstate(all="ignore"):
        loss = np.where((advantages == 0) & (logs == -np.inf), 0, -advantages * logs)
    costs = np.asarray(entropy_cost).astype(np.longdouble)
    return loss - costs * policy_entropy(logits, **options)


def clipped_surrogate_loss(
    logits,
    actions,
    old_log_probs,
    advantages,
    *,
    clip=0.2,
    temperature=1.0,
    entropy_cost=0.0,
    where=None,
):
    options = {"temperature": temperature, "where": where}
    logs = policy_log_prob(logits, actions, **options)
    old, advantages, clip, costs = (
        np.asarray(x).astype(np.longdouble)
        for x in (old_log_probs, advantages, clip, entropy_cost)
    )
    ratio = np.exp(logs - old)
    clipped = np.clip(ratio, 1 - clip, 1 + clip)
    surrogate = np.minimum(ratio * advantages, clipped * advantages)
    return -surrogate - costs * policy_entropy(logits, **options)


def soft_value(values, *, temperature=1.0, axis=-1, where=None):
    def rule(legal, temperature):
        if any(map(_isnan, legal)):
            return NAN
        if temperature == 0 or max(legal) == INF:
            return max(legal)
        if temperature == INF:
            return INF if len(legal) > 1 else legal[0]
        return temperature * mp.log(mp.fsum(mp.exp(v / temperature) for v in legal))

    return _with_options(rule, -INF, values, axis, where, temperature=temperature)


def expected_value(values, *, temperature=1.0, epsilon=0.0, axis=-1, where=None):
    def rule(legal, temperature, epsilon):
        if any(map(_isnan, legal)) or max(legal) == INF:
            return sum(map(float, legal))
        probs = _policy_row(legal, temperature, epsilon)
        return mp.fsum(p * v for p, v in zip(probs, legal, strict=True))

    options = {"temperature": temperature, "epsilon": epsilon}
    return _with_options(rule, 0.0, values, axis, where, **options)


def actor_critic_value(
    values, logits, *, temperature=1.0, policy_temperature=1.0, axis=-1, where=None
):
    options = {"axis": axis, "where": where, "temperature": policy_temperature}
    probs, logs = softmax(logits, **options), log_softmax(logits, **options)
    temperature = np.asarray(temperature).astype(np.longdouble)
    values = np.asarray(values).astype(np.longdouble)
    with np.errstate(all="ignore"):
        terms = np.where(probs > 0, probs * (values - temperature * logs), 0)
    return terms.sum(normalise_axis(axis, values.ndim))


def bellman_target(rewards, discounts, next_values):
    rewards, discounts, values = (
        np.asarray(x).astype(np.longdouble) for x in (rewards, discounts, next_values)
    )
    with np.errstate(all="ignore"):
        return rewards + np.where(discounts == 0, 0, discounts * values)


def exponential_temperature(step, *, initial, half_life, final=0.0):
    step, initial, half_life, final = (
        np.asarray(x).astype(np.longdouble) for x in (step, initial, half_life, final)
    )
    with np.errstate(all="ignore"):
        kept = np.where(step == 0, np.longdouble(1), np.longdouble(2) ** (-step / half_life))
    return final + (initial - final) * kept


def visit_count_temperature(values, counts, *, axis=-1, where=None):
    def rule(legal, counts):
        return INF if counts <= 1 else (max(legal) - min(legal)) / mp.log(counts)

    return _with_options(rule, 0.0, values, axis, where, keepdims=True, counts=counts)


def _boltzmann_mean(rewards, legal, log_temperature):
    """The mean of `rewards(log p)` under a Boltzmann policy."""
    logs = _log_softmax_row(legal, mp.exp(log_temperature), -INF)
    return mp.fsum(mp.exp(log) * r for log, r in zip(logs, rewards(logs), strict=True))


def target_entropy_temperature(values, target, *, axis=-1, where=None):
    def rule(legal, target):
        if target <= mp.log(legal.count(max(legal))):
            return mp.mpf(0)
        if target >= mp.log(len(legal)):
            return INF
        entropy = functools.partial(_boltzmann_mean, lambda logs: [-v for v in logs], legal)
        return mp.exp(_root(lambda u: target - entropy(u), mp.mpf(-40), mp.mpf(40)))

    return _with_options(rule, 0.0, values, axis, where, keepdims=True, target=target)


def mellowmax_temperature(values, *, omega, axis=-1, where=None):
    def rule(legal, omega):
        if omega <= 0:
            return INF
        if omega == INF or max(legal) == min(legal):
            return mp.mpf(0)
        mean = mp.fsum(mp.exp(omega * v) for v in legal) / len(legal)
        goal = mp.log(mean) / omega
        value = functools.partial(_boltzmann_mean, lambda _: legal, legal)
        return mp.exp(_root(lambda u: value(u) - goal, mp.mpf(-40), mp.mpf(40)))

    return _with_options(rule, 0.0, values, axis, where, keepdims=True, omega=omega)


@quiet
def attention(
    queries,
    keys,
    values,
    *,
    keep=True,
    bias=0,
    scale=None,
    soft_cap=None,
    cap_bias=False,
    sink=-INF,
    score=None,
    weigh=None,
):
    """Averages and log-sum-exp of softmax attention in extended precision, head by head.

    `score(s, head)` changes the scores [T, S] of a head; what is not kept takes no part,
    whatever stands there. `weigh(row)` stands for the softmax.
    """
    queries, keys, values, bias, sink = (
        np.asarray(x).astype(np.longdouble) for x in (queries, keys, values, bias, sink)
    )
    *batch, num_queries, heads, width = queries.shape
    groups = heads // keys.shape[-2]
    full = (*batch, heads, num_queries, keys.shape[-3])
    keep, bias = np.broadcast_to(keep, full), np.broadcast_to(bias, full)
    scale = np.broadcast_to(1 / np.sqrt(width) if scale is None else scale, heads)
    cap = None if soft_cap is None else np.broadcast_to(soft_cap, heads)
    sink = np.broadcast_to(sink, heads)
    out = np.zeros((*batch, num_queries, heads, values.shape[-1]), np.longdouble)
    lse = np.full((*batch, num_queries, heads), -INF, np.longdouble)
    for *place, n in np.ndindex(*batch, heads):
        place = tuple(place)
        q, k, v = queries[place][:, n], *(x[place][:, n // groups] for x in (keys, values))
        s, b = np.longdouble(scale[n]) * (q @ k.T), bias[place][n]
        s = s + b if cap_bias else s
        s = s if cap is None else cap[n] * np.tanh(s / cap[n])
        s = s if cap_bias else s + b
        s = s if score is None else score(s, n)
        kept = keep[place][n] & (bias[place][n] != -INF) & (s != -INF)
        for t in range(num_queries):
            row = np.append(s[t][kept[t]], sink[n])
            peak = row.max()
            if peak > -INF:
                weights = np.exp(row - peak)
                if weigh is not None:
                    weights = np.append(weigh(row[:-1].astype(np.float64)), 0)
                out[place][t, n] = weights[:-1] @ v[kept[t]] / weights.sum()
                lse[place][t, n] = peak + np.log(weights.sum())
    return out, lse


def alibi_slopes(num_heads):
    """By the recursion over powers of two."""
    if num_heads & (num_heads - 1) == 0:
        return [2.0 ** (-8 * i / num_heads) for i in range(1, num_heads + 1)]
    power = 2 ** int(np.log2(num_heads))
    return alibi_slopes(power) + alibi_slopes(2 * power)[::2][: num_heads - power]


def qk_norm(queries, keys, *, query_scale=1.0, key_scale=1.0, epsilon=1e-6):
    """Vectors over their root mean squares, in extended precision."""

    def unit(x, scale):
        x, scale = (np.asarray(a).astype(np.longdouble) for a in (x, scale))
        return scale * x / np.sqrt(np.mean(x**2, -1, keepdims=True) + np.longdouble(epsilon))

    return unit(queries, query_scale), unit(keys, key_scale)


def scalable_queries(queries, counts, scale=1.0):
    queries, counts, scale = (
        np.asarray(a).astype(np.longdouble) for a in (queries, counts, scale)
    )
    return queries * (np.log(np.maximum(counts, 1))[..., None] * scale)[..., None]


def merge_attention(outs, lses):
    outs, lses = (np.asarray(x).astype(np.longdouble) for x in (outs, lses))
    shares = np.exp(lses - lses.max(0))
    lse = lses.max(0) + np.log(shares.sum(0))
    return np.sum(shares[..., None] * outs, 0) / shares.sum(0)[..., None], lse


def paged_attention(queries, key_pages, value_pages, page_table, lengths, **options):
    """Sequence by sequence, over the keys up to its length, the last queries aligned."""
    key_pages, value_pages, page_table = map(np.asarray, (key_pages, value_pages, page_table))
    outs = []
    for q, pages, length in zip(
        np.asarray(queries), page_table, np.asarray(lengths), strict=True
    ):
        k, v = (x[pages].reshape(-1, *x.shape[2:])[:length] for x in (key_pages, value_pages))
        keep = np.tri(len(q), length, length - len(q), dtype=bool)
        outs.append(attention(q, k, v, keep=keep, **options)[0])
    return np.stack(outs)


# Calibration.


def _examples(scores, labels, axis, ignore_index):
    """Rows of entries, with the label of each, without those that are ignored."""
    scores = np.moveaxis(np.asarray(scores), axis, -1)
    rows = scores.reshape(-1, scores.shape[-1])
    labels = np.asarray(labels).reshape(-1)
    kept = labels != (-1 - abs(labels).max(initial=0) if ignore_index is None else ignore_index)
    return rows[kept], labels[kept]


def fit_temperature(logits, labels, *, axis=-1, where=None, ignore_index=None):
    """The root of sum(z_y - <p, z>) in 1 / T, by bisection; for a root that there is."""
    logits = np.asarray(logits).astype(np.float64)
    if where is not None:
        logits = np.where(np.broadcast_to(np.asarray(where), logits.shape), logits, -INF)
    rows, labels = _examples(logits, labels, axis, ignore_index)
    rows = [[mp.mpf(float(z)) if z != -INF else None for z in row] for row in rows]

    def excess(inverse):
        total = mp.mpf(0)
        for row, label in zip(rows, labels, strict=True):
            peak = max(z for z in row if z is not None)
            weights = [0 if z is None else mp.exp(inverse * (z - peak)) for z in row]
            mean = mp.fsum(w * z for w, z in zip(weights, row, strict=True) if w)
            total += row[label] - mean / mp.fsum(weights)
        return total

    low, high = mp.mpf(2) ** -140, mp.mpf(2) ** 140
    assert excess(low) > 0 > excess(high), "no temperature between the limits is best"
    for _ in range(200):
        middle = mp.sqrt(low * high)
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return to_longdouble(1 / low)


def reliability(probs, labels, num_bins, bins="width", *, axis=-1, ignore_index=None):
    """Sums over the bins, divided by their counts: `[3, num_bins]`."""
    rows, labels = _examples(np.asarray(probs).astype(np.float64), labels, axis, ignore_index)
    found = sorted(
        (float(max(row)), int(np.argmax(row) == label))
        for row, label in zip(rows, labels, strict=True)
    )
    if bins == "mass":
        groups = [list(g) for g in np.array_split(np.arange(len(found)), num_bins)]
    else:
        place = [max(0, math.ceil(num_bins * confidence) - 1) for confidence, _ in found]
        groups = [[i for i, b in enumerate(place) if b == bin_] for bin_ in range(num_bins)]
    columns = []
    for group in groups:
        count = len(group)
        sums = [math.fsum(found[i][j] for i in group) for j in range(2)]
        columns.append([np.longdouble(s) / max(count, 1) for s in sums] + [count])
    return np.array(columns, np.longdouble).T


def expected_calibration_error(probs, labels, *, num_bins=15, bins="width", **options):
    confidence, accuracy, count = reliability(probs, labels, num_bins, bins, **options)
    return (count * abs(accuracy - confidence)).sum() / max(count.sum(), 1)


def brier_score(probs, labels, *, axis=-1):
    p = np.moveaxis(np.asarray(probs).astype(np.longdouble), axis, -1)
    targets = np.arange(p.shape[-1]) == np.asarray(labels)[..., None]
    return ((p - targets) ** 2).sum(-1)


def ensemble_log_probs(logits, *, member_axis=0, where=None, space="probability"):
    """Member by member, in 60 digits; the classes lie along the last axis."""
    logits = np.asarray(logits).astype(np.float64)
    if where is not None:
        logits = np.where(np.broadcast_to(np.asarray(where), logits.shape), logits, -INF)
    members = np.moveaxis(logits, member_axis, 0)
    if space == "logit":
        dropped = (members == -INF).any(0)
        means = np.where(dropped, 0, members).astype(np.longdouble).sum(0) / len(members)
        means = np.where(dropped, -INF, means.astype(np.float64))
        return log_softmax(means)
    out = np.empty(members.shape[1:], np.longdouble)
    for index in np.ndindex(out.shape[:-1]):
        rows = [list(map(float, m[index])) for m in members]
        rows = [row for row in rows if max(row) != -INF]
        logs = [_log_softmax_row([mp.mpf(v) for v in row], 1.0, -INF) for row in rows]
        for i in range(out.shape[-1]):
            total = mp.fsum(mp.exp(row[i]) for row in logs if row[i] != -INF)
            out[index][i] = to_longdouble(mp.log(total / len(rows))) if total else -INF
    return out


def conformity(logits, kind, penalty=0.0, num_free=0):
    """The score of every class, along the last axis."""
    logs = log_softmax(np.asarray(logits).astype(np.float64))
    if kind == "threshold":
        return -logs
    out = np.empty_like(logs)
    for index in np.ndindex(logs.shape[:-1]):
        total = np.longdouble(0)
        for place, i in enumerate(np.argsort(-logs[index], kind="stable"), start=1):
            total += np.exp(logs[index][i])
            extra = float(penalty) * max(0, place - num_free) if kind == "raps" else 0
            out[index][i] = total + extra if logs[index][i] != -INF else INF
    return out


def conformal_threshold(logits, labels, *, level, kind, penalty=0.0, num_free=0):
    """The label's scores in order, and the one whose place is wanted."""
    scores = conformity(logits, kind, penalty, num_free)
    labels = np.asarray(labels)
    own = sorted(scores[index][labels[index]] for index in np.ndindex(labels.shape))
    place = math.ceil(fractions.Fraction(str(level)) * (len(own) + 1))
    return own[place - 1] if place <= len(own) else np.longdouble(INF)


def energy_score(logits, *, where=None, temperature=1.0):
    return -soft_value(logits, where=where, temperature=temperature)
