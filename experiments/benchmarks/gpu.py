"""Do the counted passes predict the times on this device?

A run takes less than nine minutes: accuracy, rows, attention and the rest. The file is written
after each figure, so that a run that is stopped keeps its figures. Each program makes many
calls, because a short call is mostly dispatch; rivals are timed in turn; results are compared
with float64 in the same run. Expected: softjax takes as many times as long as its peer as it
moves more bytes (`compiled-h200.json`), within a quarter. Each ratio outside of that refutes a
counted prediction, and is listed.
"""

import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, ShapeDtypeStruct, lax

import softjax as sj
from experiments.benchmarks import _measure as measure
from experiments.benchmarks import compiled
from experiments.benchmarks._measure import Function
from softjax import masks

__all__ = ["FULL", "QUICK", "Contest", "Sizes", "contests", "errors", "main", "repeated", "run"]

COUNTED = Path(__file__).parent / "results" / "compiled-h200.json"
CHECKED = 64  # rows whose results are compared with float64
LONGEST_CHECKED = 4096  # tokens, likewise: float64 forms all their scores
TILES = (2**22, 2**24, 2**26)  # scores of a tile, over all heads
TOLERANCE = 1.25  # by which a ratio of times may differ from that of bytes
OURS = "softjax"
LATE = "no time was left in its step"


@dataclasses.dataclass(frozen=True)
class Contest:
    """A function of some arrays, in one mode, by rivals of which the first is softjax's."""

    step: str
    name: str
    mode: str
    args: tuple[ShapeDtypeStruct, ...]
    num_floats: int
    arms: Mapping[str, Function]
    base: str | None  # the arm that the others are compared with
    exact: Function | None  # that of float64, unless the result is random
    calls: int  # made by one program

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the largest array."""
        return max(self.args, key=lambda x: math.prod(x.shape)).shape


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is timed, and for how long."""

    arrays: compiled.Sizes = compiled.FULL
    lengths: tuple[int, ...] = (1024, 2048, 4096, 16384)
    layer: tuple[int, int, int] = (4096, 512, 32768)  # tokens, width, classes
    work: int = 2**32  # entries that the calls of one program touch, about
    # Seconds, after which no figure of a step is begun.
    seconds: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"accuracy": 45, "rows": 110, "attention": 180, "others": 75}
    )
    per_contest: float = 1.0
    least: int = 5


FULL = Sizes()
QUICK = Sizes(compiled.QUICK, (16,), (8, 4, 32), 2, dict.fromkeys(FULL.seconds, 60.0), 0.01, 2)
HEAD = ["step", "function", "largest array", "mode", "arm", "us per call", "over"]
HEAD += ["ratio of times", "of bytes, counted", "error in eps", "failed"]


def main(args: Sequence[str]) -> int:
    """Runs, prints the table and, with --out, writes that file, or `gpu-<platform>.json`."""
    options = measure.options(__doc__, args, "gpu")
    folder, name = options.out, f"gpu-{jax.devices()[0].platform}"
    if folder is not None and folder.suffix == ".json":
        folder, name = folder.parent, folder.stem
    results: dict[str, Any] = {}
    for results in run(QUICK if options.quick else FULL):
        measure.write(folder, name, results)
    print(_report(results))
    return 0


def run(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """The results so far, again after each contest."""
    results: dict[str, Any] = {"benchmark": "gpu", "environment": measure.environment()}
    results["records"] = []
    counted = _counted() if results["environment"]["platform"] == "gpu" else {}
    for step, group in itertools.groupby(contests(sizes), lambda contest: contest.step):
        deadline = time.perf_counter() + sizes.seconds[step]
        for contest in group:
            results["records"] += _measured(contest, sizes, counted, deadline)
            yield results


def contests(sizes: Sizes) -> Iterator[Contest]:
    """All contests, the most informative first."""
    cases = [case for case in compiled.cases(sizes.arrays) if case.name[:9] != "attention"]
    rows = [case for case in cases if case.shape in sizes.arrays.rows]
    first = [case for case in rows if case.shape == sizes.arrays.rows[0]]
    for case, mode in itertools.product(first, ("value", "gradient")):
        yield _of_case(case, mode, "accuracy", sizes, calls=1)
    for mode, case in itertools.product(("both", "value"), rows):
        yield _of_case(case, mode, "rows", sizes)
    for length in sizes.lengths:
        for is_causal, mode in itertools.product((False, True), ("value", "gradient")):
            yield _attention(length, is_causal, mode, sizes)
    for case in cases:
        if case not in rows:
            yield _of_case(case, "both" if case.num_floats else "value", "others", sizes)
    yield _layer(sizes)


def _of_case(
    case: compiled.Case, mode: str, step: str, sizes: Sizes, calls: int | None = None
) -> Contest:
    arms = {OURS: case.ours}
    if case.peer is not None and case.peer_name is not None:
        arms[case.peer_name] = case.peer
    # Filters are compared with a sort, which rounds a sum in another order: a tie may fall
    # otherwise. The plain definition is exact enough everywhere else.
    is_exact = case.num_floats > 0 and case.peer_name != "sort"
    return Contest(
        *(step, case.name, mode, case.args, case.num_floats, arms, case.peer_name),
        exact=case.peer if is_exact else None,
        calls=calls or _calls(case.args, sizes),
    )


def _calls(args: Sequence[ShapeDtypeStruct], sizes: Sizes, passes: int = 1) -> int:
    entries = max(math.prod(x.shape) for x in args) * passes
    return max(2, min(1000, sizes.work // entries))


def _attention(length: int, is_causal: bool, mode: str, sizes: Sizes) -> Contest:
    batch, _, heads, width = sizes.arrays.tokens
    tokens = (ShapeDtypeStruct((batch, length, heads, width), jnp.bfloat16),) * 3
    mask = masks.Causal() if is_causal else None
    attend = functools.partial(sj.attention, mask=mask)
    theirs = functools.partial(jax.nn.dot_product_attention, is_causal=is_causal)
    arms: dict[str, Function] = {OURS: attend, "jax.nn": theirs}
    if jax.devices()[0].platform == "gpu":
        arms["jax.nn, cudnn"] = functools.partial(theirs, implementation="cudnn")
    if (tokamax := measure.peer("tokamax")) is not None:
        arms["tokamax"] = functools.partial(tokamax.dot_product_attention, is_causal=is_causal)
    arms["softjax, dense"] = functools.partial(attend, implementation="dense")
    for scores in TILES:
        side = math.isqrt(scores // (batch * heads))
        if side < length:
            tiled = functools.partial(attend, block_size=side)
            arms[f"softjax, tiles of 2^{scores.bit_length() - 1}"] = tiled
    title = "attention, causal" if is_causal else "attention"
    exact = functools.partial(_exact_attention, is_causal=is_causal)
    return Contest(
        *("attention", title, mode, tokens, 3, arms, "jax.nn"),
        exact=exact if length <= LONGEST_CHECKED else None,
        calls=_calls(tokens, sizes, passes=max(1, length // 16)),
    )


def _exact_attention(queries: Array, keys: Array, values: Array, is_causal: bool) -> Array:
    scores = jnp.einsum("btnh,bsnh->bnts", queries, keys) / math.sqrt(queries.shape[-1])
    if is_causal:
        seen = np.tri(queries.shape[1], keys.shape[1], dtype=bool)
        scores = jnp.where(seen, scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), values)


def _layer(sizes: Sizes) -> Contest:
    num_tokens, width, num_classes = sizes.layer
    shapes = (num_tokens, width), (num_classes, width)
    args = tuple(ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    labels = ShapeDtypeStruct((num_tokens,), jnp.int32)

    def theirs(features: Array, weights: Array, labels: Array) -> Array:
        logits = jnp.matmul(features, weights.T, preferred_element_type=jnp.float32)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    return Contest(
        *("others", "linear_cross_entropy", "both", (*args, labels), 2),
        arms={OURS: sj.linear_cross_entropy, "optax": theirs},
        base="optax",
        exact=None,  # The sum over all tokens and classes is too much for float64.
        calls=_calls(args, sizes, passes=16),
    )


def _in_mode(function: Function, contest: Contest) -> Function:
    """The function of (cotangent, arguments), which the value ignores."""
    if contest.mode == "value":
        return lambda bar, *args: function(*args)
    both = measure.with_gradient(function, contest.num_floats)
    return both if contest.mode == "both" else lambda *args: both(*args)[1]


def repeated(function: Function, calls: int) -> Function:
    """A function that makes so many calls, one after the other, and returns the last result."""

    def run(*args: Any) -> Any:
        shapes = jax.eval_shape(function, *args)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        # Each call waits for the one before, so that XLA cannot make one of all.
        again = lambda _, out: function(*lax.optimization_barrier((args, out))[0])
        return lax.fori_loop(0, calls, again, nothing)

    return run


def _measured(
    contest: Contest, sizes: Sizes, counted: Mapping[Any, float], deadline: float
) -> list[dict[str, Any]]:
    """One record for each arm. The failure of an arm is recorded, and the others go on."""
    records = {arm: _head(contest, arm) for arm in contest.arms}
    if time.perf_counter() > deadline:
        return [record | {"failed": LATE} for record in records.values()]
    bar, args = _arrays(contest)
    truth: Any = None
    if contest.exact is not None:
        truth = _in_float64(contest, contest.exact, bar, args)
    calls: dict[str, Callable[[], object]] = {}
    for arm, function in contest.arms.items():
        if time.perf_counter() > deadline:
            records[arm]["failed"] = LATE
            continue
        try:
            once = _in_mode(function, contest)
            program = jax.jit(repeated(once, contest.calls)).lower(bar, *args).compile()
            out = jax.block_until_ready(program(bar, *args))
            if truth is not None:
                records[arm]["error"] = errors(_checked(contest, out), truth)
            calls[arm] = functools.partial(program, bar, *args)
        except Exception as error:
            text = str(error).strip() or "no message"
            records[arm]["failed"] = f"{type(error).__name__}: {text.splitlines()[0][:200]}"
    if contest.step != "accuracy" and calls:
        times = measure.paired(calls, seconds=sizes.per_contest, least=sizes.least)
        for arm in calls:
            records[arm]["seconds"] = times.median(arm) / contest.calls
            if contest.base in calls and arm != contest.base:
                records[arm]["ratio"] = times.ratio(arm, contest.base)
    ours = records[OURS]
    ours["counted_ratio"] = counted.get((contest.name, contest.shape, contest.mode))
    if ours["counted_ratio"] and ours["ratio"]:
        off = abs(math.log(ours["ratio"] / ours["counted_ratio"]))
        ours["is_wrong"] = off > math.log(TOLERANCE)
    return list(records.values())


def _head(contest: Contest, arm: str) -> dict[str, Any]:
    return {
        "step": contest.step,
        "function": contest.name,
        "shape": list(contest.shape),
        "mode": contest.mode,
        "arm": arm,
        "base": contest.base,
        "calls": contest.calls,
        **dict.fromkeys(("seconds", "ratio", "counted_ratio", "is_wrong", "error", "failed")),
    }


def _arrays(contest: Contest) -> tuple[Array, list[Any]]:
    """A cotangent and arguments for the shapes of a contest."""
    rng = np.random.default_rng(0)
    args: list[Any] = []
    for x in contest.args:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            args.append(jax.random.key(0))
        elif x.dtype == jnp.bool_:
            args.append(jnp.asarray(rng.random(x.shape) < 0.7))
        elif jnp.issubdtype(x.dtype, jnp.integer):
            classes = contest.shape[-1]
            if contest.name == "linear_cross_entropy":
                classes = contest.args[1].shape[0]
            args.append(jnp.asarray(rng.integers(0, classes, x.shape), x.dtype))
        else:
            args.append(jnp.asarray(rng.standard_normal(x.shape, np.float32), x.dtype))
    value = jax.eval_shape(contest.arms[OURS], *args)
    return jnp.asarray(rng.standard_normal(value.shape, np.float32), value.dtype), args


def _checked(contest: Contest, tree: Any) -> Any:
    """The part of arrays that is compared with float64, on the host."""
    if contest.step == "attention":
        return jax.tree.map(lambda x: np.asarray(x[:1, :, :1]), tree)
    if "axis 0" in contest.name:
        return jax.tree.map(lambda x: np.asarray(x[:, :CHECKED]), tree)
    return jax.tree.map(lambda x: np.asarray(x[:CHECKED]), tree)


def _in_float64(contest: Contest, exact: Function, bar: Array, args: Sequence[Any]) -> Any:
    part = _checked(contest, (bar, *args))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        is_real = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
        wide = [jnp.asarray(x, jnp.float64 if is_real(x) else x.dtype) for x in part]
        return jax.tree.map(np.asarray, _in_mode(exact, contest)(*wide))


def errors(found: Any, truth: Any) -> float:
    """The largest error of any array, over its largest true entry, in eps of its dtype."""
    worst = 0.0
    for x, true in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
        eps, x = float(jnp.finfo(x.dtype).eps), x.astype(np.float64)
        same = (x == true) | (np.isnan(x) & np.isnan(true))
        far = np.where(same, 0, np.abs(np.where(same, 0, x) - np.where(same, 0, true)))
        size = np.max(np.abs(true), initial=0, where=np.isfinite(true))
        found_error = float(np.max(far, initial=0)) / (eps * (float(size) or 1.0))
        # JSON has no infinity, and a NaN is no small error.
        worst = max(worst, found_error if math.isfinite(found_error) else 1e30)
    return worst


def _counted() -> dict[Any, float]:
    """Bytes moved over the peer's, by function, shape and mode."""
    if not COUNTED.exists():
        return {}
    records = json.loads(COUNTED.read_text(encoding="utf-8"))["records"]
    return {
        (r["function"], tuple(r["shape"]), r["mode"]): r["ours"]["bytes"] / r["peer"]["bytes"]
        for r in records
        if r["peer"] is not None
    }


def _report(results: dict[str, Any]) -> str:
    records = results["records"]
    wrong = [r for r in records if r["is_wrong"]]
    lines = [
        f"{r['function']} {measure.by(r['shape'])}, {r['mode']}: {measure.number(r['ratio'])}"
        f" times as long as {r['base']}, counted {measure.number(r['counted_ratio'])}."
        for r in wrong
    ]
    judged = [r for r in records if r["is_wrong"] is not None]
    verdict = f"{len(wrong)} of {len(judged)} counted predictions were wrong"
    verdict += ":\n\n" + "\n".join(f"- {line}" for line in lines) if wrong else "."
    return "\n\n".join(
        [
            f"{measure.machine(results['environment'])}. Times are per call, of many calls in "
            "one program; a ratio is the median of the rounds. An error is over the largest "
            "true entry.",
            measure.table(HEAD, map(_row, records)),
            verdict,
        ]
    )


def _row(record: dict[str, Any]) -> list[str]:
    return [
        *(record["step"], record["function"], measure.by(record["shape"]), record["mode"]),
        *(record["arm"], measure.scaled(record["seconds"], 1e6), record["base"] or "-"),
        *(measure.number(record["ratio"]), measure.number(record["counted_ratio"])),
        *(measure.scaled(record["error"], 1.0), record["failed"] or "-"),
    ]
