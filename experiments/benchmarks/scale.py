"""How much do 8, 256 and 8192 devices send to one another, and how much does each hold?

`axis_name` spreads the normalised axis over the devices of a mesh. XLA compiles each function
for simulated devices, with no data, and the bytes of the arrays in its collectives are counted:
its payload. It does not depend on the number n of devices, so that the bytes for more devices
follow: in a ring, each device sends 2 (n - 1) / n B for an all-reduce of B bytes, and half of
that for an all-gather or a reduce-scatter. Expected: only all-reduces, except where pairs of
embeddings meet, and the same payload on 2 devices as on 8. A payload that grows with the
devices refutes it.

For N tokens of D features, V classes, numbers of 4 bytes:

- Maps and losses of logits add up a few numbers per token, and never send logits, of which a
  device holds 4 N V / n bytes.
- `linear_cross_entropy` adds up 16 N bytes for the value, and 4 N D + 16 N with its gradient,
  where 4 N D are the gradient of the features. No collective stands in its loop over classes. A
  device holds 4 V D / n bytes of weights, as many of their gradient, and a few MiB of logits.
- A ring of attention sends the keys and values of a device n - 1 times for the value, and three
  times as much with the gradient: nearly the same, however many devices share a sequence.

Which of it overlaps with work:

- The all-reduces do not: each needs all logits of a device, and the next work needs its sum.
  Only the 4 N D bytes of the features' gradient may travel while that of the weights is formed.
- A hop of the ring does, if a device works on it for longer than the next keys and values
  travel. At F flop/s, links of W bytes/s and numbers of b bytes, a device needs b F / (2 W)
  tokens of its own, divided by the query heads that share keys; and twice as many for a causal
  mask in zigzag order, which halves the work. In contiguous order the last device works in
  every hop, so that a causal mask saves no time.
- The hops of the gradient hardly do: each is a collective inside of a switch, across which
  compilers move no work. On a torus, a shift by h places takes h links.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import softjax as sj
from experiments import _processes
from experiments.benchmarks import _measure as measure
from experiments.benchmarks._measure import Function

__all__ = ["QUICK", "main", "run"]

SIMULATED = (1, 2, 4, 8)
REAL = (8, 256, 8192)
TOKENS, WIDTH = 2**20, 1024  # of a ring of attention
FLOPS = 1e15
LINKS = {"450 GB/s, in a node": 450e9, "50 GB/s, between nodes": 50e9}
ON_PAPER = (
    "Simulated devices share one processor: they show the memory and bytes of each device,"
    " which hold for real ones up to what compilers choose, and no time, latency or overlap."
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of what is compiled: N tokens, D features, V classes."""

    num_tokens: int = 2048
    num_features: int = 256
    num_classes: int = 65536
    num_pairs: int = 4096
    num_devices: tuple[int, ...] = SIMULATED


QUICK = Sizes(8, 4, 64, 16, (1, 2))


@dataclasses.dataclass(frozen=True)
class Case:
    """A function, and its arguments, of which the first ones are differentiated."""

    function: Function
    args: tuple[tuple[ShapeDtypeStruct, P], ...]
    num_floats: int = 1
    returns_entries: bool = False  # If not, one number per token, or one in all.


def main(args: Sequence[str]) -> int:
    """Runs, prints the tables and, with --out, writes `scale-<platform>.json`."""
    options = measure.options(__doc__, args, "scale")
    sizes = QUICK if options.quick else Sizes()
    _processes.connect(max(sizes.num_devices))
    results = run(sizes)
    print(_report(results))
    measure.write(options.out, f"scale-{results['environment']['platform']}", results)
    return 0


def run(sizes: Sizes) -> dict[str, Any]:
    """Collectives and memory per device of each function."""
    environment = measure.environment()
    most = sizes.num_devices[-1]
    records = [
        {"function": name, "mode": mode, **_counted(case, mode, most)}
        for name, case in _cases(sizes).items()
        for mode in ("value", "gradient")
    ]
    scaling = []
    for kind in ("strong", "weak"):
        for n in sizes.num_devices:
            each = sizes.num_classes // (n if kind == "strong" else most)
            case = _linear(dataclasses.replace(sizes, num_classes=each * n))
            found = {"scaling": kind, "devices": n, "classes_per_device": each}
            scaling.append({**found, **_counted(case, "gradient", n)})
    return {
        "benchmark": "scale",
        "environment": environment,
        "sizes": dataclasses.asdict(sizes),
        "records": records,
        "scaling": scaling,
    }


# What is compiled.


def _cases(sizes: Sizes) -> dict[str, Case]:
    logits = _float(sizes.num_tokens, sizes.num_classes), P(None, "classes")
    labels = ShapeDtypeStruct((sizes.num_tokens,), jnp.int32), P()
    pairs = _float(sizes.num_pairs, sizes.num_features), P("classes", None)
    maps = (sj.softmax, sj.log_softmax, sj.sparsemax, sj.entmax15)
    return {
        **{f.__name__: Case(f, (logits,), returns_entries=True) for f in maps},
        "logsumexp": Case(functools.partial(sj.logsumexp, axis=-1), (logits,)),
        "entropy": Case(sj.entropy, (logits,)),
        "kl_divergence": Case(sj.kl_divergence, (logits, logits), num_floats=2),
        "cross_entropy": Case(sj.cross_entropy, (logits, labels)),
        "sparsemax_loss": Case(sj.sparsemax_loss, (logits, labels)),
        "linear_cross_entropy": _linear(sizes),
        "info_nce": Case(functools.partial(sj.info_nce, temperature=0.1), (pairs, pairs), 2),
        "siglip_loss": Case(
            functools.partial(sj.siglip_loss, temperature=0.1, bias=0.0), (pairs, pairs), 2
        ),
    }


def _linear(sizes: Sizes) -> Case:
    features = _float(sizes.num_tokens, sizes.num_features), P()
    weights = _float(sizes.num_classes, sizes.num_features), P("classes", None)
    labels = ShapeDtypeStruct((sizes.num_tokens,), jnp.int32), P()
    return Case(sj.linear_cross_entropy, (features, weights, labels), num_floats=2)


def _float(*shape: int) -> ShapeDtypeStruct:
    return ShapeDtypeStruct(shape, jnp.float32)


# The counts.


def _counted(case: Case, mode: str, num_devices: int) -> dict[str, Any]:
    """The collectives and memory of one device, from the compiled program."""
    devices = jax.devices()[:num_devices]
    mesh = jax.make_mesh((num_devices,), ("classes",), (AxisType.Auto,), devices=devices)
    specs = tuple(spec for _, spec in case.args)
    part = functools.partial(case.function, axis_name="classes")
    out = P(None, "classes") if case.returns_entries else P()
    function: Function = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=out)
    args = [_on(mesh, x, spec) for x, spec in case.args]
    if mode == "gradient":
        bar = _on(mesh, jax.eval_shape(function, *args), out)
        function, args = measure.with_gradient(function, case.num_floats), [bar, *args]
    program = jax.jit(function).lower(*args).compile()
    found = _collectives(program.as_text() or "")
    once = [(kind, size) for kind, size, is_in_loop in found if not is_in_loop]
    payload = dict.fromkeys(sorted(kind for kind, _ in once), 0)
    for kind, size in once:
        # The result of a reduce-scatter is the part of one device.
        payload[kind] += size * (num_devices if kind == "reduce-scatter" else 1)
    return {
        "collectives": {kind: sum(x == kind for x, _ in once) for kind in payload},
        "payload_bytes": payload,
        "payload_bytes_in_loops": sum(size for _, size, is_in_loop in found if is_in_loop),
        **measure.planned_bytes(program),
    }


def _on(mesh: jax.sharding.Mesh, x: ShapeDtypeStruct, spec: P) -> ShapeDtypeStruct:
    return ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))


def _collectives(program: str) -> list[tuple[str, int, bool]]:
    """The kind and bytes of each collective, and whether it stands in a loop."""
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    lines = re.finditer(rf"= (.*?) ({kinds})(?:-start)?\((.*)", program)
    return [(x[2], _bytes_of(x[1]), "while/body" in x[3]) for x in lines]


def _bytes_of(shapes: str) -> int:
    """The bytes of shapes such as `(f32[8,4]{1,0}, s32[])`."""
    return sum(
        int(bits or 8) // 8 * math.prod(int(size) for size in sizes.split(",") if size)
        for bits, sizes in re.findall(r"(?:pred|[a-z]+(\d+))\[([\d,]*)\]", shapes)
    )


def _sent(payload_bytes: dict[str, int], num_devices: int) -> float:
    """The bytes that each device sends, by a ring: twice around for a sum, else once."""
    rounds = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}
    payload = sum(rounds[kind] * size for kind, size in payload_bytes.items())
    return payload * (num_devices - 1) / num_devices


def _ring_sent(num_devices: int) -> float:
    """The bytes that each device sends for the value of a ring: its keys and values, on."""
    return (num_devices - 1) * 8 * TOKENS * WIDTH / num_devices


# The page.


def _report(results: dict[str, Any]) -> str:
    sizes = Sizes(**results["sizes"])
    shape = f"{sizes.num_tokens} tokens, {sizes.num_classes} classes"
    many = [f"{n} devices" for n in REAL]
    sent = measure.table(
        ["function", "mode", "collectives", "payload", *many, "payload of a search's step"],
        (
            [
                *(record["function"], record["mode"], _counts(record["collectives"])),
                _kib(sum(record["payload_bytes"].values())),
                *(_kib(_sent(record["payload_bytes"], n)) for n in REAL),
                _kib(record["payload_bytes_in_loops"]),
            ]
            for record in results["records"]
        ),
    )
    per_class = {"logits": sizes.num_tokens, "weights and gradient": 2 * sizes.num_features}
    per_device = measure.table(
        ["MiB that a device holds", *many],
        (
            [name, *(f"{4 * sizes.num_classes * count / n / 2**20:.4g}" for n in REAL)]
            for name, count in per_class.items()
        ),
    )
    value = [_ring_sent(n) / 2**20 for n in REAL]
    held = [8 * TOKENS * WIDTH / n / 2**20 for n in REAL]
    ring = measure.table(
        ["ring of attention", *many],
        [
            ["tokens of a device", *(str(TOKENS // n) for n in REAL)],
            ["MiB of keys and values held", *(f"{size:.4g}" for size in held)],
            ["MiB sent, value", *(f"{size:.4g}" for size in value)],
            ["MiB sent, with gradient", *(f"{3 * size:.4g}" for size in value)],
        ],
    )
    tokens = [f"{2 * FLOPS / (2 * speed):.0f}" for speed in LINKS.values()]
    overlap = measure.table(
        ["links", *LINKS], [["tokens of a device from which a hop overlaps", *tokens]]
    )
    products = 4 * 2 * sizes.num_tokens * sizes.num_features  # for each class
    scaling = measure.table(
        ["scaling", "devices", "classes of each", "GFLOP", "temporary MiB", "payload"],
        (
            [
                *(record["scaling"], str(record["devices"])),
                str(record["classes_per_device"]),
                measure.scaled(products * record["classes_per_device"], 1e-9),
                measure.scaled(record["temporary_bytes"], 2**-20),
                _kib(sum(record["payload_bytes"].values())),
            ]
            for record in results["scaling"]
        ),
    )
    parts = [
        f"KiB that each device sends in a step: {shape}, {sizes.num_features} features or"
        f" {sizes.num_pairs} pairs, float32.",
        sent,
        per_device,
        f"A ring over {TOKENS} tokens, keys and values of {WIDTH} numbers, float32.",
        ring,
        f"At {FLOPS:.0e} flop/s in bfloat16, where each query head has keys of its own.",
        overlap,
        "Strong and weak scaling of linear_cross_entropy with its gradient, as compiled.",
        scaling,
        ON_PAPER,
    ]
    return "\n\n".join(parts)


def _counts(collectives: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in collectives.items())


def _kib(size: float) -> str:
    return f"{size / 1024:.5g}" if size else "-"
