"""How many bytes cross between devices in a step of attention over a sequence in parts?

Each device holds a part of a sequence of a fixed length, and attends with a causal mask in each
of the three contexts, for the value alone, for its tangent, and for its gradient with it. The
program is traced for a mesh that needs no devices, and each collective is counted as often as
it runs: a loop over the hops takes another branch of a switch in each, so that a count in the
text of the program would be n times too large. Bytes are those that a device sends. Expected:
the formula to the byte, in which KV is the keys and values of one device, Q its queries or
averages, P its positions and n the number of devices. Any other number refutes it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import softjax as sj
from experiments.benchmarks import _measure as measure
from softjax import masks

__all__ = ["QUICK", "main", "run", "sent_bytes"]

HEAD = [
    "context",
    "mode",
    "dtype",
    "devices",
    "tokens",
    "MiB sent",
    "formula",
    "MiB of formula",
]
HEAD += ["pass"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A sequence, and the numbers of devices that share it."""

    tokens: int = 32768
    heads: int = 32
    key_heads: int = 8
    width: int = 128
    devices: tuple[int, ...] = (2, 4, 8)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    judged: bool = True


QUICK = Sizes(64, 4, 2, 8, devices=(2,), dtypes=("bfloat16",), judged=False)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Bytes on one of n devices: of keys and values, of queries, and of positions."""

    n: int
    kv: int
    q: int
    p: int
    wide: int  # how many times as large as KV its tangents and cotangents are in a ring


Formula = tuple[str, Callable[[Parts], float]]
MODES = ("value", "tangent", "gradient")
# Of the value, and of the tangent or the gradient together with the value.
FORMULAS: dict[str, tuple[Formula, Formula]] = {
    "ring": (
        ("(n - 1) (KV + P)", lambda x: (x.n - 1) * (x.kv + x.p)),
        (
            "(n - 1) (2 KV + KV' + 2 P)",
            lambda x: (x.n - 1) * ((2 + x.wide) * x.kv + 2 * x.p),
        ),
    ),
    "allgather": (
        ("(n - 1) (KV + P)", lambda x: (x.n - 1) * (x.kv + x.p)),
        ("(n - 1) (2 KV + P)", lambda x: (x.n - 1) * (2 * x.kv + x.p)),
    ),
    "ulysses": (
        (
            "(n - 1) ((KV + 2 Q) / n + 2 P)",
            lambda x: (x.n - 1) * ((x.kv + 2 * x.q) / x.n + 2 * x.p),
        ),
        (
            "(n - 1) ((2 KV + 4 Q) / n + 2 P)",
            lambda x: (x.n - 1) * ((2 * x.kv + 4 * x.q) / x.n + 2 * x.p),
        ),
    ),
}


def main(args: Sequence[str]) -> int:
    """Runs, prints the table and, with --out, writes `ring-<platform>.json`."""
    options = measure.options(__doc__, args, "ring")
    results = run(QUICK if options.quick else Sizes())
    print(_report(results))
    measure.write(options.out, f"ring-{results['environment']['platform']}", results)
    return 0


def run(sizes: Sizes) -> dict[str, Any]:
    """Bytes that a device sends, beside the formula."""
    records = [
        _counted(context, mode, dtype, num_devices, sizes)
        for context in FORMULAS
        for mode in MODES
        for dtype in sizes.dtypes
        for num_devices in sizes.devices
        if context != "ulysses" or sizes.key_heads % num_devices == 0
    ]
    return {"benchmark": "ring", "environment": measure.environment(), "records": records}


def sent_bytes(jaxpr: Jaxpr) -> float:
    """Bytes that one device sends while a program runs, by the usual ring algorithms."""
    return sum(map(_sent_by, jaxpr.eqns))


def _sent_by(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    held = sum(math.prod(x.aval.shape) * x.aval.dtype.itemsize for x in equation.invars)
    if name == "ppermute":
        return held
    if name in ("all_gather", "reduce_scatter", "all_to_all"):
        size = params["axis_size"] if "axis_size" in params else _axis_size(equation)
        return held * (size - 1) / (1 if name == "all_gather" else size)
    inner = list(map(sent_bytes, _jaxprs(params)))
    if name == "cond":
        # The hops of a ring take each branch once, and no other condition has collectives.
        return sum(inner) / len(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _axis_size(equation: Any) -> int:
    """How many times as many tokens, or fewer heads, there are behind an exchange."""
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return max(m // n for m, n in zip(after, before, strict=True))


def _jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for leaf in jax.tree.leaves(
        list(params.values()), is_leaf=lambda x: isinstance(x, (Jaxpr, ClosedJaxpr))
    ):
        if isinstance(leaf, (Jaxpr, ClosedJaxpr)):
            yield leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf


def _counted(
    context: str, mode: str, dtype: str, num_devices: int, sizes: Sizes
) -> dict[str, Any]:
    spec = PartitionSpec("ring")
    attend = functools.partial(sj.attention, mask=masks.Causal(), context=context)
    call = jax.shard_map(
        lambda q, k, v: attend(q, k, v, axis_name="ring"),
        mesh=AbstractMesh((num_devices,), ("ring",), axis_types=(AxisType.Auto,)),
        in_specs=(spec,) * 3,
        out_specs=spec,
    )
    of_heads = lambda n: jax.ShapeDtypeStruct((sizes.tokens, n, sizes.width), jnp.dtype(dtype))
    queries, keys = of_heads(sizes.heads), of_heads(sizes.key_heads)
    args = queries, keys, keys
    program: measure.Function = call
    if mode == "tangent":
        program = lambda *args: jax.jvp(call, args, args)
    elif mode == "gradient":
        program = lambda *args: jax.vjp(call, *args)[1](args[0])
    counted = sent_bytes(jax.make_jaxpr(program)(*args).jaxpr)
    size = lambda x: math.prod(x.shape) * x.dtype.itemsize // num_devices
    parts = Parts(
        n=num_devices,
        kv=2 * size(keys),
        q=size(queries),
        p=4 * sizes.tokens // num_devices,
        wide=4 // keys.dtype.itemsize,
    )
    text, formula = FORMULAS[context][mode != "value"]
    return {
        "context": context,
        "mode": mode,
        "dtype": dtype,
        "devices": num_devices,
        "tokens": sizes.tokens,
        "bytes": counted,
        "formula": text,
        "formula_bytes": formula(parts),
        "passed": counted == formula(parts) if sizes.judged else None,
    }


def _report(results: dict[str, Any]) -> str:
    return "\n\n".join(
        [
            "Bytes that one device sends, traced with jax"
            f" {results['environment']['versions']['jax']}. The tangent and the gradient"
            " include the value. KV' is KV in float32, as tangents and cotangents travel.",
            measure.table(HEAD, map(_row, results["records"])),
        ]
    )


def _row(record: dict[str, Any]) -> list[str]:
    mebibytes = functools.partial(measure.scaled, unit=2**-20)
    return [
        *(record["context"], record["mode"], record["dtype"], str(record["devices"])),
        *(str(record["tokens"]), mebibytes(record["bytes"]), record["formula"]),
        *(mebibytes(record["formula_bytes"]), measure.verdict(record["passed"])),
    ]
