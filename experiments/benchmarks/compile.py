"""How large is the program of each public function, and how long until it runs?

Every function is traced and compiled with nothing remembered, alone and together with its
gradient, at a small and a large shape in float32, in turn with its peer where there is one;
without a peer, compilation is timed at the large shape alone, because it takes most of the
time. Equations count each jaxpr once, however often it is called. Calls outside of `jit` are
timed at the small shape, because a large one hides the dispatch behind the work. Expected:
every figure within the limit beside it. A limit that is missed in run after run refutes it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import softjax as sj
from experiments.benchmarks import _measure as measure
from experiments.benchmarks._measure import Function
from softjax import masks

__all__ = ["QUICK", "cases", "main", "run"]

Shape = tuple[int, ...]
Shapes = tuple[Shape, Shape]  # a small and a large one
Maker = Callable[[Shape], Any]  # of an argument, from the shape
Peer = tuple[str | None, Function | None]


@dataclasses.dataclass(frozen=True)
class Case:
    """A public function with its arguments and its peer."""

    name: str
    ours: Function
    args: tuple[Maker, ...]
    floats: int  # number of arguments with a derivative, which come first
    shapes: Shapes
    peer_name: str | None
    peer: Function | None  # None: there is none, or it is not installed.


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Which functions, how many of the two shapes, and for how long each is measured."""

    names: tuple[str, ...] | None = None  # None: all.
    num_shapes: int = 2
    call_seconds: float = 0.05
    judged: bool = True


QUICK = Sizes(("softmax", "cross_entropy", "sample"), 1, 0.0, judged=False)
LOGITS = (64, 128), (4096, 1024)
TOKENS = (1, 128, 4, 64), (1, 2048, 4, 64)  # batch, tokens, heads, width
PAGES = (4, 1, 4, 64), (64, 1, 4, 64)
FEATURES = (64, 64), (2048, 256)
CLASSES = 1000  # of output layers
LIMITS: dict[tuple[str, str, Shape], dict[str, float]] = {
    ("softmax", "value", LOGITS[0]): {"equations": 120},
    ("softmax", "value", LOGITS[1]): {"equations": 200, "compile_ratio": 5},
    ("softmax", "gradient", LOGITS[1]): {"compile_ratio": 3},
    ("log_softmax", "value", LOGITS[1]): {"equations": 250, "compile_ratio": 6},
    ("logsumexp", "value", LOGITS[1]): {"equations": 200},
    ("cross_entropy", "gradient", LOGITS[1]): {"equations": 250, "compile_ratio": 1.5},
    ("distillation_loss", "gradient", LOGITS[1]): {"equations": 500, "compile_ratio": 4},
    ("sparsemax", "value", LOGITS[1]): {"equations": 700, "compile_ratio": 3.3},
    ("entmax15", "value", LOGITS[1]): {"equations": 900},
    ("top_p_filter", "value", LOGITS[1]): {"equations": 700, "compile_ratio": 3.3},
    ("select_action", "value", LOGITS[1]): {"equations": 500},
    ("kl_divergence", "gradient", LOGITS[1]): {"equations": 500},
    ("sample", "value", LOGITS[1]): {"compile_ratio": 4},
    ("attention", "gradient", TOKENS[1]): {"compile_ratio": 5},
}
HEAD = ["function", "mode", "shape", "equations", "ms to compile", "us per call", "peer"]
HEAD += ["its equations", "its ms", "its us", "time to compile over the peer's", "pass"]


def main(args: Sequence[str]) -> int:
    """Runs, prints the table and, with --out, writes `compile-<platform>.json`."""
    options = measure.options(__doc__, args, "compile")
    results = run(QUICK if options.quick else Sizes())
    print(_report(results))
    measure.write(options.out, f"compile-{results['environment']['platform']}", results)
    return 0


def run(sizes: Sizes) -> dict[str, Any]:
    """Equations and times, in seconds, with the environment that they hold for."""
    environment = measure.environment()
    jax.jit(jnp.sum).lower(jnp.ones(3)).compile()  # The first program also starts LLVM.
    rows = [
        Row(case, mode, shape)
        for case in cases()
        if sizes.names is None or case.name in sizes.names
        for mode in ("value", "gradient")[: 1 + (case.floats > 0)]
        for shape in case.shapes[: sizes.num_shapes]
    ]
    # All calls come first, because JAX forgets what they share when compilation is timed.
    calls = [_called(row, sizes) if row.is_small else {} for row in rows]
    records = [_compiled(row, sizes) | called for row, called in zip(rows, calls, strict=True)]
    return {"benchmark": "compile", "environment": environment, "records": records}


@dataclasses.dataclass(frozen=True)
class Row:
    """A function in one mode at one shape."""

    case: Case
    mode: str
    shape: Shape

    @property
    def is_small(self) -> bool:
        """Whether this is the smaller of the two shapes."""
        return self.shape == self.case.shapes[0]

    def programs(self) -> dict[str, tuple[Function, Sequence[Any]]]:
        """The function and its peer, each with its arguments."""
        args = [make(self.shape) for make in self.case.args]
        functions = {"ours": self.case.ours, "peer": self.case.peer}
        found: dict[str, tuple[Function, Sequence[Any]]] = {}
        for name, function in functions.items():
            if function is None:
                continue
            found[name] = function, args
            if self.mode == "gradient":
                bar = measure.cotangent(function, *args)
                found[name] = measure.with_gradient(function, self.case.floats), [bar, *args]
        return found


def _called(row: Row, sizes: Sizes) -> dict[str, Any]:
    """Seconds per call outside of `jit`."""
    calls = {name: functools.partial(f, *args) for name, (f, args) in row.programs().items()}
    times = measure.paired(calls, seconds=sizes.call_seconds, least=3)
    seconds = {name: times.median(name) for name in calls}
    return {"call_seconds": seconds["ours"], "peer_call_seconds": seconds.get("peer")}


def _compiled(row: Row, sizes: Sizes) -> dict[str, Any]:
    """Equations and the time to trace and compile, beside their limits."""
    programs = row.programs()
    limits = LIMITS.get((row.case.name, row.mode, row.shape), {}) if sizes.judged else {}
    rounds = 3 if limits else 0 if row.is_small and row.case.peer_name is None else 1
    times, _ = measure.compile_times(programs, rounds=rounds)
    seconds = {name: times.median(name) for name in programs} if rounds else {}
    counts = {name: measure.equations(f, *args) for name, (f, args) in programs.items()}
    record = {
        "function": row.case.name,
        "mode": row.mode,
        "shape": list(row.shape),
        "equations": counts["ours"],
        "compile_seconds": seconds.get("ours"),
        "call_seconds": None,
        "peer": row.case.peer_name,
        "peer_equations": counts.get("peer"),
        "peer_compile_seconds": seconds.get("peer"),
        "peer_call_seconds": None,
        "compile_ratio": times.ratio("ours", "peer") if "peer" in seconds else None,
        "rounds": times.rounds,
        "limits": limits,
    }
    return record | {"passed": measure.kept(record, limits)}


def cases() -> list[Case]:
    """Every public function but `check_labels`, which reads its labels, and one of a text."""
    distrax = measure.peer("distrax")
    found: list[Case] = []

    def add(
        name: str,
        ours: Function,
        *args: Maker,
        floats: int = 1,
        shapes: Shapes = LOGITS,
        peer: Peer = (None, None),
    ) -> None:
        found.append(Case(name, ours, args, floats, shapes, *peer))

    def of_distrax(function: Function) -> Peer:
        return "distrax", None if distrax is None else function

    # Maps and reductions.
    for name in ("softmax", "log_softmax"):
        add(name, getattr(sj, name), _logits, peer=("jax.nn", getattr(jax.nn, name)))
    for name in ("logsumexp", "logmeanexp"):
        ours, theirs = (functools.partial(getattr(m, name), axis=-1) for m in (sj, jax.nn))
        add(name, ours, _logits, peer=("jax.nn", theirs))
    add("mellowmax", lambda z: sj.mellowmax(z, omega=2.0), _logits)
    project = "optax", jax.vmap(optax.projections.projection_simplex)
    add("sparsemax", sj.sparsemax, _logits, peer=project)
    add("entmax15", sj.entmax15, _logits)
    add("entmax", sj.entmax, _logits, _positive, floats=2)
    add("soft_top_k", lambda z: sj.soft_top_k(z, 8), _logits)
    segments = functools.partial(sj.segment_softmax, num_segments=64)
    add("segment_softmax", segments, _long, _segments)
    segments = functools.partial(sj.segment_logsumexp, num_segments=64)
    add("segment_logsumexp", segments, _long, _segments)
    add(
        "entropy",
        sj.entropy,
        _logits,
        peer=of_distrax(lambda z: distrax.Categorical(z).entropy()),
    )
    peer = of_distrax(lambda p, q: distrax.Categorical(p).kl_divergence(distrax.Categorical(q)))
    add("kl_divergence", sj.kl_divergence, _logits, _others, floats=2, peer=peer)
    add("jensen_shannon_divergence", sj.jensen_shannon_divergence, _logits, _others, floats=2)
    peer = of_distrax(lambda z, y: distrax.Categorical(z).log_prob(y))
    add("log_prob", sj.log_prob, _logits, _labels, peer=peer)

    # Losses.
    peer = "optax", optax.softmax_cross_entropy_with_integer_labels
    add("cross_entropy", sj.cross_entropy, _logits, _labels, peer=peer)
    peer = "optax", optax.softmax_cross_entropy
    add("soft_cross_entropy", sj.soft_cross_entropy, _logits, _probs, floats=2, peer=peer)
    distil = functools.partial(sj.distillation_loss, temperature=2.0)
    peer = "definition", _distillation
    add("distillation_loss", distil, _logits, _others, floats=2, peer=peer)
    add("focal_loss", functools.partial(sj.focal_loss, gamma=2.0), _logits, _labels)
    add(
        "sigmoid_focal_loss",
        lambda z, p: sj.sigmoid_focal_loss(z, p, gamma=2.0),
        _logits,
        _probs,
    )
    add("sparsemax_loss", sj.sparsemax_loss, _logits, _labels)
    add("entmax_loss", sj.entmax_loss, _logits, _labels)
    add("mean_loss", lambda v, y: sj.mean_loss(v, y, ignore_index=0), _per_row, _labels)
    add("class_balanced_weights", lambda n: sj.class_balanced_weights(n, beta=0.9), _counts)
    contrast = functools.partial(sj.info_nce, temperature=0.5)
    add("info_nce", contrast, _logits, _others, floats=2, shapes=FEATURES)
    contrast = functools.partial(sj.siglip_loss, temperature=0.5, bias=-1.0)
    add("siglip_loss", contrast, _logits, _others, floats=2, shapes=FEATURES)

    # Calibration.
    for name in ("fit_temperature", "conformal_threshold"):
        add(name, getattr(sj, name), _logits, _labels)
    for name in ("brier_score", "expected_calibration_error"):
        add(name, getattr(sj, name), _probs, _labels)
    add("reliability", lambda p, y: jnp.stack(sj.reliability(p, y)), _probs, _labels)
    mixture = lambda *members: sj.ensemble_log_probs(jnp.stack(members))
    add("ensemble_log_probs", mixture, _logits, _others, floats=2)
    add("prediction_sets", lambda z: sj.prediction_sets(z, 2.0), _logits, floats=0)
    add("energy_score", sj.energy_score, _logits)

    # Output layers.
    layer = functools.partial(add, floats=2, shapes=FEATURES)
    peer = "optax", _plain_layer
    layer("linear_cross_entropy", sj.linear_cross_entropy, *_LAYER, peer=peer)
    layer("linear_statistics", lambda *args: sj.linear_statistics(*args).entropy, *_LAYER)
    double = lambda x, w, u: sj.linear_distillation_loss(x, w, u, w, temperature=2.0)
    layer("linear_distillation_loss", double, _logits, _weights, _others)
    mixed = lambda x, w, u: sj.linear_jensen_shannon_divergence(x, w, u, w)
    layer("linear_jensen_shannon_divergence", mixed, _logits, _weights, _others)
    sampled = lambda x, w, y, key: sj.sampled_cross_entropy(key, x, w, y, num_samples=64)
    layer("sampled_cross_entropy", sampled, *_LAYER, _key)
    adaptive = lambda x, w, y: sj.adaptive_log_softmax(
        x, w[:101], [(jnp.ones((4, x.shape[1])), w[101:, :4])], y
    )
    layer("adaptive_log_softmax", adaptive, *_LAYER)

    # Scores and filters.
    add("soft_cap", lambda z: sj.soft_cap(z, 2.0), _logits)
    for name in ("scalable_scores", "sigsoftmax_scores", "taylor_scores"):
        add(name, getattr(sj, name), _logits)
    add("adjusted_scores", sj.adjusted_scores, _logits, _per_class, floats=2)
    add("logit_adjustment", sj.logit_adjustment, _counts)
    sorted_p, sorted_k = ("sort", _sorted_top_p), ("sort", _sorted_top_k)
    add("top_p_filter", lambda z: sj.top_p_filter(z, 0.9), _logits, peer=sorted_p)
    add("top_k_filter", lambda z: sj.top_k_filter(z, 50), _logits, peer=sorted_k)
    add("min_p_filter", lambda z: sj.min_p_filter(z, 0.1), _logits)
    add("top_n_sigma_filter", lambda z: sj.top_n_sigma_filter(z, 1.0), _logits)
    add("epsilon_filter", lambda z: sj.epsilon_filter(z, 1e-3), _logits)
    add("eta_filter", lambda z: sj.eta_filter(z, 1e-3), _logits)
    add("typical_filter", lambda z: sj.typical_filter(z, 0.9), _logits)
    add("repetition_penalty", lambda z, t: sj.repetition_penalty(z, t, 1.2), _logits, _tokens)

    # Samples.
    peer = "jax.random", lambda z, key: jax.random.categorical(key, z)
    add("sample", lambda z, key: sj.sample(key, z), _logits, _key, floats=0, peer=peer)
    peer = "jax.random", lambda z, key: jax.random.gumbel(key, z.shape, z.dtype)
    add(
        "gumbel",
        lambda z, key: sj.gumbel(key, z.shape, dtype=z.dtype),
        _logits,
        _key,
        floats=0,
        peer=peer,
    )
    given = lambda z, y, key: sj.gumbel_given_argmax(key, z, y)
    add("gumbel_given_argmax", given, _logits, _labels, _key)
    for name in ("gumbel_softmax", "rao_blackwell_gumbel_softmax", "reinmax"):
        add(name, _key_last(getattr(sj, name)), _logits, _key)
    density = functools.partial(sj.relaxed_log_density, temperature=0.5)
    add("relaxed_log_density", density, _logits, _log_probs, floats=2)
    ranking = lambda z, key: sj.sample_without_replacement(key, z, 8)[1]
    add("sample_without_replacement", ranking, _logits, _key)
    add("weighted_subset", lambda z, key: sj.weighted_subset(key, z, 8)[1], _logits, _key)
    add("ranking_log_prob", sj.ranking_log_prob, _logits, _tokens)

    # Policies.
    peer = of_distrax(lambda z, key: distrax.Categorical(z).sample_and_log_prob(seed=key)[1])
    add("select_action", lambda z, key: sj.select_action(key, z)[1], _logits, _key, peer=peer)
    for name in ("policy_probs", "policy_entropy", "expected_value", "soft_value"):
        add(name, getattr(sj, name), _logits)
    add("policy_log_prob", sj.policy_log_prob, _logits, _labels)
    add(
        "policy_gradient_loss",
        lambda z, v, a: sj.policy_gradient_loss(z, a, v),
        _logits,
        _per_row,
        _labels,
    )
    surrogate = lambda z, v, a: sj.clipped_surrogate_loss(z, a, v - 5, v)
    add("clipped_surrogate_loss", surrogate, _logits, _per_row, _labels)
    add("actor_critic_value", sj.actor_critic_value, _logits, _others, floats=2)
    add("bellman_target", lambda r: sj.bellman_target(r, 0.9, r), _per_row)
    decay = lambda t: sj.exponential_temperature(t, initial=1.0, half_life=9.0)
    add("exponential_temperature", decay, _per_row)
    add("visit_count_temperature", lambda z: sj.visit_count_temperature(z, 9.0), _logits)
    add("target_entropy_temperature", lambda z: sj.target_entropy_temperature(z, 1.0), _logits)
    add("mellowmax_temperature", lambda z: sj.mellowmax_temperature(z, omega=2.0), _logits)

    # Attention.
    attend = functools.partial(add, shapes=TOKENS)
    causal = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    attend(
        "attention",
        functools.partial(sj.attention, mask=masks.Causal()),
        *[_logits] * 3,
        floats=3,
        peer=("jax.nn", causal),
    )
    add("paged_attention", _paged, _logits, shapes=PAGES)
    attend(
        "merge_attention", lambda o, c: sj.merge_attention(o, c)[0], _logits, _per_row, floats=2
    )
    attend("qk_norm", lambda q, k: sj.qk_norm(q, k)[0], _logits, _others)
    attend("scalable_queries", lambda q: sj.scalable_queries(q, q.shape[1]), _logits)
    for order in (sj.zigzag_permutation, sj.inverse_zigzag_permutation):
        in_parts = lambda q, order=order: order(2 * q.shape[1], q.shape[1])
        attend(order.__name__, in_parts, _logits, floats=0)
    attend("alibi_slopes", lambda q: sj.alibi_slopes(q.shape[2]), _logits, floats=0)

    # Gradients.
    add("clip_gradient", functools.partial(sj.clip_gradient, max_norm=1.0), _logits)
    add("reverse_gradient", sj.reverse_gradient, _logits)
    add("score_function", sj.score_function, _per_row, _per_row, floats=2)
    add("straight_through", sj.straight_through, _logits, _others, floats=2)
    return found


def _normal(shape: Shape, seed: int) -> Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def _integers(shape: Shape, end: int) -> Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, end, shape))


_logits: Maker = lambda shape: _normal(shape, 0)
_others: Maker = lambda shape: _normal(shape, 1)
_probs: Maker = lambda shape: jax.nn.softmax(_others(shape))
_log_probs: Maker = lambda shape: jax.nn.log_softmax(_others(shape))
_per_row: Maker = lambda shape: _normal(shape[:-1], 2)
_positive: Maker = lambda shape: 1.2 + 0.1 * jax.nn.sigmoid(_normal((shape[0], 1), 2))
_per_class: Maker = lambda shape: _normal(shape[-1:], 3)
_counts: Maker = lambda shape: 1.0 + _integers(shape[-1:], 99)
_labels: Maker = lambda shape: _integers(shape[:-1], shape[-1])
_tokens: Maker = lambda shape: jnp.tile(jnp.arange(16), (shape[0], 1))
_long: Maker = lambda shape: _normal((shape[0] * shape[1],), 0)
_segments: Maker = lambda shape: jnp.sort(_integers((shape[0] * shape[1],), 64))
_key: Maker = lambda shape: jax.random.key(0)
_weights: Maker = lambda shape: 0.05 * _normal((CLASSES, shape[1]), 3)
_classes: Maker = lambda shape: _integers(shape[:1], CLASSES)
_LAYER = _logits, _weights, _classes


def _key_last(draw: Function) -> Function:
    return lambda logits, key: draw(key, logits)


def _paged(queries: Array) -> Array:
    """Each sequence reads two pages of 16 tokens."""
    num_sequences, _, num_heads, width = queries.shape
    pages = jnp.ones((2 * num_sequences, 16, num_heads, width))
    page_table = jnp.arange(2 * num_sequences).reshape(num_sequences, 2)
    return sj.paged_attention(queries, pages, pages, page_table, jnp.full(num_sequences, 20))


def _plain_layer(features: Array, weights: Array, labels: Array) -> Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(features @ weights.T, labels)
    return jnp.mean(losses)


def _distillation(student: Array, teacher: Array) -> Array:
    """T^2 KL(softmax(teacher / T), softmax(student / T)) at T = 2."""
    log_p, log_q = jax.nn.log_softmax(teacher / 2), jax.nn.log_softmax(student / 2)
    return 4 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _sorted_top_p(logits: Array) -> Array:
    """The nucleus as it is usually found: sort, sum up, cut."""
    descending = jnp.sort(logits, axis=-1, descending=True)
    mass = jnp.cumsum(jax.nn.softmax(descending), axis=-1)
    last = jnp.sum(mass < 0.9, axis=-1, keepdims=True)
    return jnp.where(logits >= jnp.take_along_axis(descending, last, axis=-1), logits, -jnp.inf)


def _sorted_top_k(logits: Array) -> Array:
    smallest = jnp.sort(logits, axis=-1, descending=True)[..., 49:50]
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def _report(results: dict[str, Any]) -> str:
    parts = [
        f"{measure.machine(results['environment'])}, float32. Gradient: with the value. A "
        "ratio is the time of softjax over the peer's, the median of the rounds.",
        measure.table(HEAD, map(_row, results["records"])),
        measure.missing("distrax"),
    ]
    return "\n\n".join(filter(None, parts))


def _row(record: dict[str, Any]) -> list[str]:
    count = lambda value: "-" if value is None else str(value)
    limits = record["limits"]
    equations = str(record["equations"])
    if "equations" in limits:
        equations = measure.limited(record["equations"], limits["equations"])
    return [
        *(record["function"], record["mode"], measure.by(record["shape"]), equations),
        measure.scaled(record["compile_seconds"], 1e3),
        measure.scaled(record["call_seconds"], 1e6),
        *(record["peer"] or "-", count(record["peer_equations"])),
        measure.scaled(record["peer_compile_seconds"], 1e3),
        measure.scaled(record["peer_call_seconds"], 1e6),
        measure.limited(record["compile_ratio"], limits.get("compile_ratio")),
        measure.verdict(record["passed"]),
    ]
