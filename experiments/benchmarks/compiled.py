"""How many passes over memory does each function make on an H200, and on a TPU v5e?

XLA compiles for a device that need not be present, so passes are counted, not timed: kernels
launched, bytes moved over the bytes of the largest array (units), loops, conditionals, calls of
a vendor's library, and temporary memory, beside `jax.nn`, optax and `jax.random`. Expected: no
more units than the peer. More of them refute it.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, ShapeDtypeStruct

import softjax as sj
from experiments.benchmarks import _measure as measure
from experiments.benchmarks import _programs as programs
from experiments.benchmarks._measure import Function
from softjax import masks

__all__ = ["FULL", "QUICK", "Case", "Sizes", "cases", "counted", "main", "run"]

Shape = tuple[int, ...]
MODES = ("value", "gradient", "both")


@dataclasses.dataclass(frozen=True)
class Case:
    """A public function with the shapes of its arguments, and its peer."""

    name: str
    ours: Function
    args: tuple[ShapeDtypeStruct, ...]
    num_floats: int = 1  # the first arguments, which are differentiated
    peer_name: str | None = None
    peer: Function | None = None

    @property
    def shape(self) -> Shape:
        """The shape of the largest array."""
        return max(self.args, key=lambda x: math.prod(x.shape)).shape

    @property
    def modes(self) -> tuple[str, ...]:
        """Value, gradient and both, or the value alone."""
        return MODES if self.num_floats else MODES[:1]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes, by the functions that take them."""

    rows: tuple[Shape, ...] = ((65536, 1024), (1048576, 21), (8192, 32768))
    others: Shape = (2048, 8192)
    draws: Shape = (64, 131072)
    tokens: Shape = (2, 2048, 8, 64)
    keep: int = 50
    modes: tuple[str, ...] = MODES


FULL = Sizes()
QUICK = Sizes(((8, 32),), (8, 24), (4, 64), (1, 16, 2, 8), 5, ("value", "both"))
HEAD = ["function", "largest array", "mode", "kernels", "units", "loops", "conditionals"]
HEAD += ["library calls", "temporary MiB", "peer", "its kernels", "its units", "its MiB"]


def main(args: Sequence[str]) -> int:
    """Runs, prints the table and, with --out, writes `compiled-<target>.json`."""
    options = measure.options(__doc__, args, "compiled", target=tuple(programs.TARGETS))
    # Optimised programs are counted.
    jax.config.update("jax_disable_most_optimizations", False)
    # Nothing runs on an accelerator, and a plugin without its device would report an error.
    jax.config.update("jax_platforms", "cpu")
    target = programs.TARGETS[options.target]
    if target.missing:
        print(target.missing, file=sys.stderr)
        return 2
    results = run(target, QUICK if options.quick else FULL)
    print(_report(results))
    measure.write(options.out, f"compiled-{options.target}", results)
    return 0


def run(target: programs.Target, sizes: Sizes) -> dict[str, Any]:
    """The counts of every function, with the versions that they hold for."""
    environment = measure.environment()
    environment["target"] = {"device": target.device, "versions": target.versions}
    records = [
        _record(case, mode, target)
        for case in cases(sizes)
        for mode in case.modes
        if mode in sizes.modes
    ]
    return {"benchmark": "compiled", "environment": environment, "records": records}


def counted(
    function: Function, case: Case, mode: str, target: programs.Target
) -> dict[str, Any]:
    """The counts of a function of the arguments of a case, in one mode, for one target."""
    args: tuple[ShapeDtypeStruct, ...] = case.args
    if mode != "value":
        bar = jax.eval_shape(function, *args)
        args = (ShapeDtypeStruct(bar.shape, bar.dtype), *args)
        both = measure.with_gradient(function, case.num_floats)
        function = both if mode == "both" else lambda *args: both(*args)[1]
    program = programs.compile_for(target, function, *args)
    found = programs.count(program.as_text() or "")
    largest = max(x.size * x.dtype.itemsize for x in case.args if not _is_key(x))
    return {
        **dataclasses.asdict(found),
        "units": found.bytes / largest,
        "temporary_bytes": measure.planned_bytes(program)["temporary_bytes"],
    }


def _is_key(x: ShapeDtypeStruct) -> bool:
    return bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def _record(case: Case, mode: str, target: programs.Target) -> dict[str, Any]:
    count = functools.partial(counted, case=case, mode=mode, target=target)
    return {
        "function": case.name,
        "shape": list(case.shape),
        "mode": mode,
        "ours": count(case.ours),
        "peer_name": case.peer_name,
        "peer": None if case.peer is None else count(case.peer),
    }


def cases(sizes: Sizes) -> Iterator[Case]:
    """Each function at each of its shapes."""
    for shape in sizes.rows:
        yield from _rows(shape)
    rows = _floats(sizes.rows[0])
    keep = ShapeDtypeStruct(sizes.rows[0], jnp.bool_)
    masked = lambda f: lambda logits, keep: f(logits, where=keep)
    yield _map("softmax, masked", rows, keep, change=masked)
    yield _map("softmax, axis 0", rows, change=lambda f: functools.partial(f, axis=0))
    warm = lambda logits: jax.nn.softmax(logits / 0.7)
    yield Case(
        "softmax, temperature",
        functools.partial(sj.softmax, temperature=0.7),
        (rows,),
        peer_name="jax.nn",
        peer=warm,
    )

    logits = _floats(sizes.others)
    two = (logits, logits)
    yield Case("kl_divergence", sj.kl_divergence, two, 2, "optax", _divergence)
    distil = functools.partial(sj.distillation_loss, temperature=2.0)
    yield Case("distillation_loss", distil, two, 2, "definition", _distillation)
    key = jax.eval_shape(lambda: jax.random.key(0))
    estimate = lambda logits, key: sj.rao_blackwell_gumbel_softmax(key, logits)
    yield Case("rao_blackwell_gumbel_softmax", estimate, (logits, key))
    project = jax.vmap(optax.projections.projection_simplex)
    yield Case("sparsemax", sj.sparsemax, (logits,), 1, "optax", project)
    yield Case("entmax15", sj.entmax15, (logits,))
    top_k = lambda logits: sj.top_k_filter(logits, sizes.keep)
    sort_k = functools.partial(_sorted_top_k, k=sizes.keep)
    yield Case("top_k_filter", top_k, (logits,), 1, "sort", sort_k)
    top_p = lambda logits: sj.top_p_filter(logits, 0.9)
    yield Case("top_p_filter", top_p, (logits,), 1, "sort", _sorted_top_p)

    draw = lambda logits, key: sj.sample(key, logits)
    categorical = lambda logits, key: jax.random.categorical(key, logits)
    args = (_floats(sizes.draws), key)
    yield Case("sample", draw, args, 0, "jax.random", categorical)

    tokens = (ShapeDtypeStruct(sizes.tokens, jnp.bfloat16),) * 3
    for is_causal in (False, True):
        ours = functools.partial(sj.attention, mask=masks.Causal() if is_causal else None)
        theirs = functools.partial(jax.nn.dot_product_attention, is_causal=is_causal)
        title = "attention, causal" if is_causal else "attention"
        yield Case(title, ours, tokens, 3, "jax.nn", theirs)


def _rows(shape: Shape) -> Iterator[Case]:
    logits, labels = _floats(shape), ShapeDtypeStruct(shape[:-1], jnp.int32)
    yield _map("softmax", logits)
    yield _map("log_softmax", logits)
    yield _map("logsumexp", logits, change=lambda f: functools.partial(f, axis=-1))
    loss = optax.softmax_cross_entropy_with_integer_labels
    yield Case("cross_entropy", sj.cross_entropy, (logits, labels), 1, "optax", loss)
    log_prob = lambda logits, labels: -loss(logits, labels)
    yield Case("log_prob", sj.log_prob, (logits, labels), 1, "optax", log_prob)


def _map(
    title: str, *args: ShapeDtypeStruct, change: Callable[[Function], Function] = lambda f: f
) -> Case:
    """A function that `jax.nn` has too, both changed alike."""
    name = title.partition(",")[0]
    ours, theirs = (change(getattr(module, name)) for module in (sj, jax.nn))
    return Case(title, ours, args, 1, "jax.nn", theirs)


def _floats(shape: Shape) -> ShapeDtypeStruct:
    return ShapeDtypeStruct(shape, jnp.float32)


def _divergence(p_logits: Array, q_logits: Array) -> Array:
    log_p, log_q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    return optax.losses.kl_divergence_with_log_targets(log_q, log_p)


def _distillation(student: Array, teacher: Array) -> Array:
    """T^2 KL(softmax(teacher / T), softmax(student / T)) at T = 2."""
    return 4 * _divergence(teacher / 2, student / 2)


def _sorted_top_k(logits: Array, k: int) -> Array:
    smallest = jnp.sort(logits, axis=-1, descending=True)[..., k - 1 : k]
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def _sorted_top_p(logits: Array) -> Array:
    """The nucleus as it is usually found: sort, sum up, cut."""
    descending = jnp.sort(logits, axis=-1, descending=True)
    mass = jnp.cumsum(jax.nn.softmax(descending), axis=-1)
    last = jnp.sum(mass < 0.9, axis=-1, keepdims=True)
    return jnp.where(logits >= jnp.take_along_axis(descending, last, axis=-1), logits, -jnp.inf)


def _report(results: dict[str, Any]) -> str:
    environment = results["environment"]
    target = environment["target"]
    versions = {"jax": environment["versions"]["jax"]} | target["versions"]
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    return "\n\n".join(
        [
            f"Compiled for {target['device']} ({names}), not run: float32, attention in "
            "bfloat16. Gradient: of a given cotangent; both: with the value. A unit is the "
            "largest array, read or written once. Loops: those whose turns depend on the data "
            "stand in parentheses, and count once.",
            measure.table(HEAD, map(_row, results["records"])),
        ]
    )


def _row(record: dict[str, Any]) -> list[str]:
    ours, peer = record["ours"], record["peer"]
    mebibytes = lambda found: measure.scaled(found["temporary_bytes"], 2**-20)
    unknown = f" ({ours['unknown_loops']})" if ours["unknown_loops"] else ""
    theirs = ["-"] * 3
    if peer is not None:
        theirs = [str(peer["kernels"]), f"{peer['units']:.1f}", mebibytes(peer)]
    return [
        *(record["function"], measure.by(record["shape"]), record["mode"]),
        *(str(ours["kernels"]), f"{ours['units']:.1f}", f"{ours['loops']}{unknown}"),
        *(str(ours["conditionals"]), str(sum(ours["custom_calls"].values()))),
        *(mebibytes(ours), record["peer_name"] or "-", *theirs),
    ]
