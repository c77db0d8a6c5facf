"""One entry, or a few, for every public function: how to call it and what must hold of it.

An entry sees its function as `call(*floats, *others)`: the float arguments that have a
derivative, then the arrays that have none. `make(seed, dtype)` draws both, in the order of
the call; `oracle` takes the same arguments. All of it is small, for Hessians.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import softjax as sj
from softjax.output_layers.sampled import log_uniform
from tests import oracles


@dataclasses.dataclass(frozen=True)
class Entry:
    """How a public function is called by the tests that hold for all."""

    name: str
    call: Callable
    oracle: Callable
    make: Callable
    variant: str = ""
    invariants: tuple[str, ...] = ()
    wide: bool = False  # whether the result is float32 or wider for all arguments

    @property
    def title(self):
        return f"{self.name}-{self.variant}" if self.variant else self.name

    def dtype(self, dtype):
        """The dtype of the result for float arguments of a dtype."""
        narrow = self.wide and dtype in ("bfloat16", "float16")
        return jnp.dtype("float32" if narrow else dtype)

    def arguments(self, seed=0, dtype="float64"):
        """The float arguments and the others, two tuples of arrays."""
        floats, others = self.make(np.random.default_rng(seed))
        dtype = jnp.dtype(dtype)
        return (
            tuple(jnp.asarray(np.asarray(f).astype(dtype)) for f in floats),
            tuple(jnp.asarray(o) for o in others),
        )


ROWS, SIZE = 2, 5
MASK = np.array([[True, True, False, True, True], [True, True, True, True, True]])


def _logits(rng, scale=1.0):
    """Well separated, so that no point lies near a kink; the places are shuffled."""
    ladder = np.linspace(-1.0, 1.0, SIZE) + 0.05 * rng.standard_normal((ROWS, SIZE))
    return scale * rng.permuted(ladder, axis=-1)


def _mask(rng):
    return rng.permuted(MASK, axis=-1)


def _per_slice(rng, low, high):
    return rng.uniform(low, high, (ROWS, 1))


def _make(*floats, others=(_mask,)):
    def make(rng):
        return [f(rng) for f in floats], [o(rng) for o in others]

    return make


def _temperature(rng):
    return _per_slice(rng, 0.6, 0.9)


def _per_label(low, high):
    return lambda rng: rng.uniform(low, high, ROWS)


def _labels(rng):
    return rng.integers(0, SIZE, ROWS)


def _both(name, call, **rest):
    """The same call of the library and of the oracle."""
    ours = lambda *args: call(sj, *args)
    reference = lambda *args: call(oracles, *args)
    return Entry(name=name, call=ours, oracle=reference, **rest)


def _qk_norm(module, queries, keys, *scales):
    names = ("query_scale", "key_scale")
    options = dict(zip(names, scales, strict=True))
    return module.qk_norm(queries, keys, epsilon=0.1, **options)


_MAP = ("mass", "shift", "permutation", "order", "temperature")


def _map_entry(name, **rest):
    return _both(
        name,
        lambda m, z, t, w: getattr(m, name)(z, where=w, temperature=t),
        make=_make(_logits, _temperature),
        invariants=_MAP,
        **rest,
    )


def _top_k_entry(kind):
    return _both(
        "soft_top_k",
        lambda m, z, k, t, w: m.soft_top_k(z, k, kind=kind, where=w, temperature=t),
        make=_make(_logits, lambda rng: _per_slice(rng, 1.3, 1.8), _temperature),
        variant=kind,
        invariants=("shift", "permutation", "order"),
    )


def _filter_entry(name, option):
    return _both(
        name,
        lambda m, z, o: getattr(m, name)(z, o),
        make=_make(_logits, others=(option,)),
        invariants=("permutation",),
    )


def _loss_entry(name, call, *options):
    return _both(
        name,
        lambda m, *args: call(getattr(m, name), *args),
        make=_make(_logits, *options, others=(_labels,)),
        invariants=("shift",),
        wide=True,
    )


def _labels(rng):
    return rng.integers(0, SIZE, ROWS)


def _probs(rng):
    return rng.dirichlet(np.full(SIZE, 4.0), ROWS)


def _with_fitting_labels(rng):
    """Labels that are likelier than chance, and not all at the peak of their slice."""
    logits, mask = _logits(rng), np.ones((ROWS, SIZE), bool)
    order = np.argsort(logits, -1)
    labels = np.array([order[0, -1], order[1, -2]])
    mask[0, order[0, 1]] = False
    return [logits], [labels, mask]


def _pairs(rng):
    return rng.standard_normal((4, 3))


_LINEAR = (
    lambda rng: rng.standard_normal((ROWS, 3)),
    lambda rng: rng.standard_normal((SIZE, 3)),
    lambda rng: rng.standard_normal(SIZE),
    lambda rng: rng.uniform(0.6, 0.9, ROWS),
)

KEY = jax.random.key(7)


def _noise(logits):
    """The noise for logits of a dtype; a wider dtype draws other noise."""
    wide = "float64" if logits.dtype == "float64" else "float32"
    return np.asarray(sj.gumbel(KEY, logits.shape, dtype=wide))


def _epsilon(rng):
    return _per_slice(rng, 0.1, 0.4)


def _advantages(rng):
    """Numbers of both signs that are not small."""
    return np.array([1.0, -1.0]) * rng.uniform(0.5, 1.5, ROWS)


def _drawn(values, temperature, epsilon, where):
    """One action per row, and its log-probability."""
    return sj.select_action(KEY, values, temperature=temperature, epsilon=epsilon, where=where)


CATALOGUE = (
    _both(
        "logsumexp",
        lambda m, z, b, w: m.logsumexp(z, axis=-1, where=w, weights=b),
        make=_make(_logits, lambda rng: rng.uniform(0.5, 1.5, (ROWS, SIZE))),
    ),
    _both(
        "logmeanexp",
        lambda m, z, w: m.logmeanexp(z, axis=-1, where=w),
        make=_make(_logits),
    ),
    _both(
        "mellowmax",
        lambda m, z, o, w: m.mellowmax(z, omega=o, where=w),
        make=_make(_logits, lambda rng: rng.uniform(1.0, 2.0)),
    ),
    _both(
        "softmax",
        lambda m, z, t, s, w: m.softmax(z, where=w, temperature=t, sink=s),
        make=_make(_logits, _temperature, lambda rng: _per_slice(rng, -0.5, 0.5)),
        variant="sink",
        invariants=("permutation", "order"),
    ),
    _map_entry("softmax"),
    _both(
        "log_softmax",
        lambda m, z, t, s, w: m.log_softmax(z, where=w, temperature=t, sink=s),
        make=_make(_logits, _temperature, lambda rng: _per_slice(rng, -0.5, 0.5)),
        invariants=("permutation", "order"),
    ),
    _map_entry("sparsemax"),
    _map_entry("entmax15"),
    _both(
        "entmax",
        lambda m, z, a, t, w: m.entmax(z, a, where=w, temperature=t),
        make=_make(_logits, lambda rng: _per_slice(rng, 1.2, 1.4), _temperature),
        invariants=("mass", "shift", "permutation", "order"),
    ),
    _both(
        "entmax",
        lambda m, z, a, t, w: m.entmax(z, a, where=w, temperature=t),
        make=_make(_logits, lambda rng: _per_slice(rng, 1.6, 1.9), _temperature),
        variant="sparse",
        invariants=("mass", "shift", "permutation", "order"),
    ),
    _top_k_entry("capped"),
    _top_k_entry("sigmoid"),
    _top_k_entry("laplace"),
    _both(
        "segment_softmax",
        lambda m, z, t, ids, w: m.segment_softmax(
            z, ids, num_segments=3, where=w, temperature=t
        ),
        make=_make(
            lambda rng: rng.standard_normal(7),
            lambda rng: rng.uniform(0.6, 0.9),
            others=(
                lambda rng: rng.permutation(np.array([0, 0, 0, 2, 2, 2, 7])),
                lambda rng: rng.permutation(np.arange(7) > 0),
            ),
        ),
    ),
    _both(
        "segment_logsumexp",
        lambda m, z, ids, w: m.segment_logsumexp(z, ids, num_segments=3, where=w),
        make=_make(
            lambda rng: rng.standard_normal(7),
            others=(
                lambda rng: rng.permutation(np.array([0, 0, 1, 1, 2, 2, 7])),
                lambda rng: rng.permutation(np.arange(7) > 0),
            ),
        ),
    ),
    _both(
        "entropy",
        lambda m, z, w: m.entropy(z, where=w),
        make=_make(_logits),
    ),
    _both(
        "kl_divergence",
        lambda m, p, q, w: m.kl_divergence(p, q, where=w),
        make=_make(_logits, _logits),
    ),
    _both(
        "jensen_shannon_divergence",
        lambda m, p, q, t, w: m.jensen_shannon_divergence(p, q, weight=t, where=w),
        make=_make(_logits, _logits, lambda rng: _per_slice(rng, 0.3, 0.6)),
    ),
    _both(
        "log_prob",
        lambda m, z, labels: m.log_prob(z, labels),
        make=_make(_logits, others=(_labels,)),
    ),
    _loss_entry("cross_entropy", lambda f, z, y: f(z, y)),
    _both(
        "cross_entropy",
        lambda m, z, e, c, w, y: m.cross_entropy(
            z, y, label_smoothing=e, z_loss=c, class_weights=w
        ),
        make=_make(
            _logits,
            _per_label(0.1, 0.4),
            _per_label(0.1, 0.4),
            lambda rng: rng.uniform(0.5, 1.5, SIZE),
            others=(_labels,),
        ),
        variant="options",
        wide=True,
    ),
    _both(
        "soft_cross_entropy",
        lambda m, z, t, w: m.soft_cross_entropy(z, t, where=w),
        make=_make(_logits, lambda rng: rng.dirichlet(np.ones(SIZE), ROWS)),
        invariants=("shift",),
        wide=True,
    ),
    _both(
        "distillation_loss",
        lambda m, s, t, temperature: m.distillation_loss(s, t, temperature=temperature),
        make=_make(_logits, _logits, _temperature, others=()),
        invariants=("shift",),
        wide=True,
    ),
    _loss_entry("focal_loss", lambda f, z, g, y: f(z, y, gamma=g), _per_label(1.2, 1.8)),
    _both(
        "sigmoid_focal_loss",
        lambda m, z, t, g, a: m.sigmoid_focal_loss(z, t, gamma=g, alpha=a),
        make=_make(
            lambda rng: rng.standard_normal((ROWS, SIZE)),
            lambda rng: rng.uniform(0.2, 0.8, (ROWS, SIZE)),
            lambda rng: rng.uniform(1.2, 1.8),
            lambda rng: rng.uniform(0.2, 0.4),
            others=(),
        ),
        wide=True,
    ),
    _loss_entry("sparsemax_loss", lambda f, z, y: f(z, y)),
    _loss_entry(
        "entmax_loss", lambda f, z, a, y: f(z, y, a), lambda rng: _per_slice(rng, 1.2, 1.4)
    ),
    _both(
        "mean_loss",
        lambda m, losses, w, a, y: m.mean_loss(
            losses, y, ignore_index=1, class_weights=w, example_weights=a
        ),
        make=_make(
            lambda rng: rng.uniform(0.5, 1.5, (ROWS, SIZE)),
            lambda rng: rng.uniform(0.5, 1.5, 3),
            lambda rng: rng.uniform(0.5, 1.5, (ROWS, SIZE)),
            others=(lambda rng: rng.integers(0, 3, (ROWS, SIZE)),),
        ),
        wide=True,
    ),
    _both(
        "class_balanced_weights",
        lambda m, n, b: m.class_balanced_weights(n, beta=b),
        make=_make(
            lambda rng: rng.uniform(1.0, 9.0, SIZE),
            lambda rng: rng.uniform(0.5, 0.9),
            others=(),
        ),
        invariants=("permutation",),
    ),
    Entry(
        name="linear_cross_entropy",
        call=lambda x, w, b, t, y: sj.linear_cross_entropy(
            x, w, y, bias=b, temperature=t, reduction=None, block_size=2
        ),
        oracle=lambda x, w, b, t, y: oracles.linear_cross_entropy(x, w, y, b, t),
        make=_make(*_LINEAR, others=(_labels,)),
        wide=True,
    ),
    Entry(
        name="linear_statistics",
        call=lambda x, w, b, t, y: jnp.stack(
            [
                getattr(
                    sj.linear_statistics(x, w, y, bias=b, temperature=t, block_size=2), field
                )
                for field in ("logsumexp", "entropy", "log_prob")
            ]
        ),
        oracle=lambda x, w, b, t, y: oracles.linear_statistics(x, w, y, b, t),
        make=_make(*_LINEAR, others=(_labels,)),
        wide=True,
    ),
    _both(
        "info_nce",
        lambda m, q, k, t: m.info_nce(q, k, temperature=t),
        make=_make(_pairs, _pairs, lambda rng: rng.uniform(0.6, 0.9), others=()),
        wide=True,
    ),
    _both(
        "siglip_loss",
        lambda m, q, k, t, b: m.siglip_loss(q, k, temperature=t, bias=b),
        make=_make(
            _pairs,
            _pairs,
            lambda rng: rng.uniform(0.6, 0.9),
            lambda rng: rng.uniform(-1.0, 0.0),
            others=(),
        ),
        wide=True,
    ),
    Entry(
        name="fit_temperature",
        call=lambda z, y, w: sj.fit_temperature(z, y, where=w),
        oracle=lambda z, y, w: oracles.fit_temperature(z, y, where=w),
        make=_with_fitting_labels,
        wide=True,
    ),
    Entry(
        name="reliability",
        call=lambda p, y: jnp.stack(sj.reliability(p, y, num_bins=3, bins="mass")),
        oracle=lambda p, y: oracles.reliability(p, y, 3, "mass"),
        make=_make(_probs, others=(_labels,)),
        wide=True,
    ),
    *(
        _both(
            "expected_calibration_error",
            lambda m, p, y, bins=bins: m.expected_calibration_error(
                p, y, num_bins=3, bins=bins
            ),
            make=_make(_probs, others=(_labels,)),
            variant=bins,
            wide=True,
        )
        for bins in ("width", "mass")
    ),
    _both(
        "brier_score",
        lambda m, p, y: m.brier_score(p, y),
        make=_make(_probs, others=(_labels,)),
        wide=True,
    ),
    *(
        _both(
            "ensemble_log_probs",
            lambda m, z, w, space=space: m.ensemble_log_probs(z, where=w, space=space),
            make=_make(lambda rng: rng.standard_normal((2, ROWS, SIZE))),
            variant=space,
        )
        for space in ("probability", "logit")
    ),
    *(
        _both(
            "conformal_threshold",
            lambda m, z, c, y, options=options: m.conformal_threshold(
                z, y, level=0.3, penalty=c, **options
            ),
            make=_make(_logits, lambda rng: rng.uniform(0.1, 0.2), others=(_labels,)),
            variant=options["kind"],
            wide=True,
        )
        for options in ({"kind": "raps", "num_free": 0},)
    ),
    _both(
        "energy_score",
        lambda m, z, t, w: m.energy_score(z, where=w, temperature=t),
        make=_make(_logits, _temperature),
    ),
    _both(
        "soft_cap",
        lambda m, z, cap: m.soft_cap(z, cap),
        make=_make(_logits, lambda rng: rng.uniform(1.0, 2.0), others=()),
        invariants=("permutation", "order"),
    ),
    _filter_entry("top_k_filter", lambda rng: rng.integers(1, 4, (ROWS, 1))),
    _filter_entry("top_p_filter", lambda rng: _per_slice(rng, 0.3, 0.8)),
    _filter_entry("min_p_filter", lambda rng: _per_slice(rng, 0.2, 0.6)),
    _filter_entry("typical_filter", lambda rng: _per_slice(rng, 0.3, 0.8)),
    _filter_entry("epsilon_filter", lambda rng: _per_slice(rng, 0.1, 0.25)),
    _filter_entry("eta_filter", lambda rng: _per_slice(rng, 0.4, 0.9)),
    _filter_entry("top_n_sigma_filter", lambda rng: _per_slice(rng, 0.5, 2.0)),
    _both(
        "scalable_scores",
        lambda m, z, s: m.scalable_scores(z, s),
        make=_make(_logits, lambda rng: rng.uniform(0.5, 1.5), others=()),
        invariants=("permutation", "order"),
    ),
    _both(
        "sigsoftmax_scores",
        lambda m, z: m.sigsoftmax_scores(z),
        make=_make(_logits, others=()),
        invariants=("permutation", "order"),
    ),
    _both(
        "taylor_scores",
        lambda m, z: m.taylor_scores(z),
        make=_make(_logits, others=()),
        invariants=("permutation",),
    ),
    _both(
        "adjusted_scores",
        lambda m, z, a: m.adjusted_scores(z, a),
        make=_make(_logits, lambda rng: rng.uniform(-2.0, 0.0, SIZE), others=()),
    ),
    _both(
        "logit_adjustment",
        lambda m, n, s: m.logit_adjustment(n, scale=s),
        make=_make(
            lambda rng: rng.uniform(1.0, 9.0, SIZE),
            lambda rng: rng.uniform(0.5, 1.5),
            others=(),
        ),
        invariants=("permutation",),
    ),
    Entry(
        name="linear_distillation_loss",
        call=lambda x, w, u, v, b, t: sj.linear_distillation_loss(
            x, w, u, v, bias=b, temperature=t, reduction=None, block_size=2
        ),
        oracle=lambda *args: oracles.linear_distillation_loss(*args),
        make=_make(
            *_LINEAR[:2],
            lambda rng: rng.standard_normal((ROWS, 2)),
            lambda rng: rng.standard_normal((SIZE, 2)),
            *_LINEAR[2:],
            others=(),
        ),
        wide=True,
    ),
    Entry(
        name="linear_jensen_shannon_divergence",
        call=lambda x, w, u, v, b, t, m: sj.linear_jensen_shannon_divergence(
            x, w, u, v, bias=b, temperature=t, weight=m, reduction=None, block_size=2
        ),
        oracle=lambda *args: oracles.linear_jensen_shannon_divergence(*args),
        make=_make(
            *_LINEAR[:2],
            lambda rng: rng.standard_normal((ROWS, 2)),
            lambda rng: rng.standard_normal((SIZE, 2)),
            *_LINEAR[2:],
            lambda rng: rng.uniform(0.2, 0.8, ROWS),
            others=(),
        ),
        wide=True,
    ),
    Entry(
        name="adaptive_log_softmax",
        call=lambda x, h, p, w, b, y: sj.adaptive_log_softmax(
            x, h, [(p, w)], y, head_bias=b, block_size=2
        ),
        oracle=lambda x, h, p, w, b, y: oracles.adaptive_log_softmax(x, h, [(p, w)], b, y),
        make=_make(
            _LINEAR[0],
            *(
                lambda rng, shape=s: rng.standard_normal(shape)
                for s in ((3, 3), (2, 3), (3, 2))
            ),
            lambda rng: rng.standard_normal(3),
            others=(lambda rng: rng.permutation([0, 3]),),
        ),
        wide=True,
    ),
    Entry(
        name="sampled_cross_entropy",
        call=lambda x, w, b, t, y: sj.sampled_cross_entropy(
            jax.random.key(0), x, w, y, bias=b, temperature=t, num_samples=4
        ),
        oracle=lambda x, w, b, t, y: oracles.sampled_cross_entropy(
            x, w, y, log_uniform(jax.random.key(0), 4, SIZE), b, t
        ),
        make=_make(*_LINEAR, others=(_labels,)),
        wide=True,
    ),
    _both(
        "repetition_penalty",
        lambda m, z, p, a, b, t: m.repetition_penalty(z, t, p, presence=a, frequency=b),
        make=_make(
            _logits,
            lambda rng: _per_slice(rng, 1.2, 1.8),
            lambda rng: _per_slice(rng, 0.2, 0.8),
            lambda rng: _per_slice(rng, 0.2, 0.8),
            others=(lambda rng: rng.permuted([[0, 2, 2, -1], [1, 4, 4, 9]], axis=-1),),
        ),
    ),
    _both(
        "ranking_log_prob",
        lambda m, z, i, w: m.ranking_log_prob(z, i, where=w),
        make=_make(
            _logits,
            others=(
                lambda rng: rng.permuted(np.tile(np.arange(SIZE), (ROWS, 1)), axis=-1),
                _mask,
            ),
        ),
        invariants=("shift",),
        wide=True,
    ),
    Entry(
        name="sample_without_replacement",
        call=lambda z, w: sj.sample_without_replacement(KEY, z, 3, where=w)[1],
        oracle=lambda z, w: oracles.ranking_log_prob(
            z, sj.sample_without_replacement(KEY, z, 3, where=w)[0], where=w
        ),
        make=_make(_logits),
        invariants=("shift",),
        wide=True,
    ),
    Entry(
        name="relaxed_log_density",
        call=lambda z, y, t, w: sj.relaxed_log_density(z, y, temperature=t, where=w),
        oracle=oracles.relaxed_log_density,
        make=_make(
            _logits,
            lambda rng: np.log(rng.dirichlet(np.full(SIZE, 30.0), ROWS)),
            _temperature,
        ),
        wide=True,
    ),
    Entry(
        name="gumbel_given_argmax",
        call=lambda z, y: sj.gumbel_given_argmax(KEY, z, y),
        oracle=lambda z, y: oracles.gumbel_given_argmax(z, y, _noise(z)),
        make=_make(_logits, others=(_labels,)),
        wide=True,
    ),
    # Policies.
    Entry(
        name="select_action",
        call=lambda q, t, e, w: _drawn(q, t, e, w)[1],
        oracle=lambda q, t, e, w: oracles.policy_log_prob(
            q, _drawn(q, t, e, w)[0], temperature=t, epsilon=e, where=w
        ),
        make=_make(_logits, _temperature, _epsilon),
        wide=True,
    ),
    _both(
        "policy_probs",
        lambda m, q, t, e, w: m.policy_probs(q, temperature=t, epsilon=e, where=w),
        make=_make(_logits, _temperature, _epsilon),
        invariants=("mass", "shift", "permutation", "order"),
    ),
    _both(
        "policy_log_prob",
        lambda m, q, t, e, a: m.policy_log_prob(q, a, temperature=t, epsilon=e),
        make=_make(_logits, _temperature, _epsilon, others=(_labels,)),
        invariants=("shift",),
        wide=True,
    ),
    _both(
        "policy_entropy",
        lambda m, q, t, e, w: m.policy_entropy(q, temperature=t, epsilon=e, where=w),
        make=_make(_logits, _temperature, _epsilon),
        invariants=("shift",),
        wide=True,
    ),
    _both(
        "policy_gradient_loss",
        lambda m, z, b, t, c, a: m.policy_gradient_loss(z, a, b, temperature=t, entropy_cost=c),
        make=_make(_logits, _advantages, _temperature, _per_label(0.1, 0.4), others=(_labels,)),
        invariants=("shift",),
        wide=True,
    ),
    _both(
        "clipped_surrogate_loss",
        lambda m, z, o, b, d, t, c, a: m.clipped_surrogate_loss(
            z, a, o, b, clip=d, temperature=t, entropy_cost=c
        ),
        make=_make(
            _logits,
            _per_label(-2.5, -1.0),
            _advantages,
            _per_label(0.1, 0.2),
            _temperature,
            _per_label(0.1, 0.4),
            others=(_labels,),
        ),
        invariants=("shift",),
        wide=True,
    ),
    _both(
        "soft_value",
        lambda m, q, t, w: m.soft_value(q, temperature=t, where=w),
        make=_make(_logits, _temperature),
    ),
    _both(
        "expected_value",
        lambda m, q, t, e, w: m.expected_value(q, temperature=t, epsilon=e, where=w),
        make=_make(_logits, _temperature, _epsilon),
    ),
    _both(
        "actor_critic_value",
        lambda m, q, z, t, u, w: m.actor_critic_value(
            q, z, temperature=t, policy_temperature=u, where=w
        ),
        make=_make(_logits, _logits, _temperature, _temperature),
    ),
    _both(
        "bellman_target",
        lambda m, r, g, v: m.bellman_target(r, g, v),
        make=_make(_advantages, _per_label(0.5, 1.0), _advantages, others=()),
    ),
    _both(
        "exponential_temperature",
        lambda m, t, i, h, f: m.exponential_temperature(t, initial=i, half_life=h, final=f),
        make=_make(
            _per_label(1.0, 3.0),
            _per_label(1.0, 2.0),
            _per_label(1.0, 3.0),
            _per_label(0.1, 0.4),
            others=(),
        ),
    ),
    _both(
        "visit_count_temperature",
        lambda m, q, n, w: m.visit_count_temperature(q, n, where=w),
        make=_make(_logits, lambda rng: _per_slice(rng, 2.0, 5.0)),
    ),
    _both(
        "target_entropy_temperature",
        lambda m, q, h, w: m.target_entropy_temperature(q, h, where=w),
        make=_make(_logits, lambda rng: _per_slice(rng, 0.6, 1.1)),
    ),
    _both(
        "mellowmax_temperature",
        lambda m, q, o, w: m.mellowmax_temperature(q, omega=o, where=w),
        make=_make(_logits, lambda rng: _per_slice(rng, 2.0, 5.0)),
    ),
    Entry(
        name="attention",
        call=lambda q, k, v, b, c, keep: sj.attention(q, k, v, mask=keep, bias=b, sink=c),
        oracle=lambda q, k, v, b, c, keep: oracles.attention(
            q, k, v, keep=keep, bias=b, sink=c
        )[0],
        make=_make(
            lambda rng: rng.standard_normal((2, 2, 3)),
            lambda rng: rng.standard_normal((3, 1, 3)),
            lambda rng: rng.standard_normal((3, 1, 2)),
            lambda rng: rng.standard_normal((2, 1, 3)),
            lambda rng: rng.standard_normal(2),
            others=(lambda rng: rng.permuted(MASK[:, :3], axis=-1),),
        ),
    ),
    Entry(
        name="qk_norm",
        call=lambda *args: jnp.concatenate(_qk_norm(sj, *args)),
        oracle=lambda *args: np.concatenate(_qk_norm(oracles, *args)),
        make=_make(
            lambda rng: rng.standard_normal((2, 2, 3)),
            lambda rng: rng.standard_normal((3, 2, 3)),
            lambda rng: rng.uniform(0.5, 2.0, (2, 3)),
            lambda rng: rng.uniform(0.5, 2.0, 3),
            others=(),
        ),
    ),
    _both(
        "scalable_queries",
        lambda m, q, s, n: m.scalable_queries(q, n, s),
        make=_make(
            lambda rng: rng.standard_normal((3, 2, 2)),
            lambda rng: rng.uniform(0.5, 2.0, 2),
            others=(lambda rng: rng.integers(1, 9, 3),),
        ),
    ),
    Entry(
        name="merge_attention",
        call=lambda o, c: sj.merge_attention(o, c)[0],
        oracle=lambda o, c: oracles.merge_attention(o, c)[0],
        make=_make(
            lambda rng: rng.standard_normal((3, 2, 4)),
            lambda rng: rng.standard_normal((3, 2)),
            others=(),
        ),
    ),
    Entry(
        name="paged_attention",
        call=lambda q, k, v, table, lengths: sj.paged_attention(q, k, v, table, lengths),
        oracle=lambda q, k, v, table, lengths: oracles.paged_attention(q, k, v, table, lengths),
        make=_make(
            lambda rng: rng.standard_normal((2, 2, 2, 3)),
            lambda rng: rng.standard_normal((4, 2, 1, 3)),
            lambda rng: rng.standard_normal((4, 2, 1, 2)),
            others=(
                lambda rng: rng.permuted(np.arange(4)).reshape(2, 2),
                lambda rng: rng.permutation([2, 3]),
            ),
        ),
    ),
)
