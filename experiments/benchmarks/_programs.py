"""Compiles for a device that need not be present, and counts what the program does.

To compile for a GPU, XLA needs only a description of it. The bytes that a program moves to and
from memory are counted from its text: each kernel reads its operands once and writes its
results once.
"""

import collections
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax import ShapeDtypeStruct
from jax.experimental import topologies
from jax.stages import Compiled

from experiments.benchmarks._measure import Function

__all__ = ["TARGETS", "Counts", "Target", "compile_for", "count"]

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to compile for."""

    device: str
    platform: str  # JAX's name of it
    module: str | None  # the plugin that compiles for it
    extra: str | None  # of this project, which installs the plugin
    packages: tuple[str, ...] = ()  # The compiled program depends on their versions.

    @property
    def missing(self) -> str:
        """The reason why nothing can be compiled for it; empty if it can."""
        if self.module is None or _found(self.module):
            return ""
        return (
            f"XLA cannot compile for {self.device}, because its plugin is not installed:"
            f" pip install -e '.[{self.extra}]'."
        )

    @property
    def versions(self) -> dict[str, str]:
        """The versions of the plugin."""
        return {name: importlib.metadata.version(name) for name in self.packages}


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # Its parent package is not installed.
        return False


CUDA = ("jax-cuda13-pjrt", "jax-cuda13-plugin")
TARGETS = {
    "h200": Target("NVIDIA H200", "cuda", "jax_plugins.xla_cuda13", "aot-gpu", CUDA),
    "v5e": Target("TPU v5e", "tpu", "libtpu", "aot-tpu", ("libtpu",)),
    "cpu": Target("the host's CPU", "cpu", None, None),
}


def compile_for(target: Target, function: Function, *args: ShapeDtypeStruct) -> Compiled:
    """The program of a function for one device of the target."""
    mesh = jax.sharding.Mesh(np.array(_devices(target)[:1]), ("device",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = [ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in args]
    # Attention asks which device is the default. The target stands for it.
    backend = {"cuda": "gpu"}.get(target.platform, target.platform)
    with mock.patch.object(jax, "default_backend", return_value=backend):
        return jax.jit(function, out_shardings=whole).lower(*placed).compile()


def _devices(target: Target) -> Sequence[Any]:
    if target.platform == "cpu":
        return jax.devices("cpu")
    if target.platform == "cuda":
        card = (HERE / "h200.txtpb").read_text(encoding="utf-8")
        topology = {"topology_name": "", "topology": "1x1x1", "target_config": card}
    else:
        # Without these, the plugin asks the network which TPU it runs on.
        for name, value in (
            ("TPU_SKIP_MDS_QUERY", "1"),
            ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
            ("TPU_WORKER_HOSTNAMES", "localhost"),
            ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ):
            os.environ.setdefault(name, value)
        topology = {"topology_name": "v5e:2x2"}
    return topologies.get_topology_desc(platform=target.platform, **topology).devices


@dataclasses.dataclass
class Counts:
    """What runs when a program runs once."""

    kernels: int = 0  # launched, each as often as its loop turns
    bytes: int = 0  # that the kernels read and write
    loops: int = 0
    unknown_loops: int = 0  # whose number of turns is unknown, and taken as one
    conditionals: int = 0  # decided, each as often as its loop turns
    custom_calls: dict[str, int] = dataclasses.field(default_factory=dict)  # by target

    def add(self, other: "Counts", times: int = 1) -> None:
        """Adds a part that runs so many times."""
        self.kernels += times * other.kernels
        self.bytes += times * other.bytes
        self.loops += other.loops
        self.unknown_loops += other.unknown_loops
        self.conditionals += times * other.conditionals
        calls = collections.Counter(self.custom_calls)
        calls.update({name: times * number for name, number in other.custom_calls.items()})
        self.custom_calls = dict(calls)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    line: str

    def called(self, *roles: str) -> list[str]:
        """The computations that it names in these roles."""
        names = []
        for role in roles:
            found = re.search(rf"\b{role}=(\{{[^}}]*\}}|%[\w.\-]+)", self.line)
            names += re.findall(r"%([\w.\-]+)", found.group(1)) if found else []
        return names


Computation = dict[str, _Instruction]
WIDTHS = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}
FREE = frozenset(
    {"after-all", "bitcast", "constant", "get-tuple-element", "opt-barrier", "parameter"}
    | {"async-done", "async-update", "copy-done", "partition-id", "replica-id", "tuple"}
)
SLICES = frozenset({"dynamic-slice", "gather", "slice"})
RENAMES = frozenset({"bitcast", "reshape"})


def count(text: str) -> Counts:
    """Counts a compiled program, which `Compiled.as_text` prints."""
    computations, entry = _parse(text)
    return _counted(computations, entry)


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation = {}
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
            current = computations[head.group(2)] = {}
            entry = head.group(2) if head.group(1) else entry
        elif found := re.match(
            r"\s+(?:ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\((.*)$", line
        ):
            name, shape, kind, rest = found.groups()
            names = tuple(re.findall(r"%([\w.\-]+)", _inside(rest)))
            current[name] = _Instruction(name, shape, kind, names, line.strip())
    return computations, entry


def _inside(rest: str) -> str:
    """The text up to the parenthesis that closes the operands."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return rest[:place]
    return rest


def _counted(computations: dict[str, Computation], name: str) -> Counts:
    total = Counts()
    here = computations[name]
    for op in here.values():
        if op.kind in FREE:
            continue
        inner = lambda names: [_counted(computations, n) for n in names if n in computations]
        if op.kind == "while":
            turns = _turns(op, computations)
            total.loops += 1
            total.unknown_loops += turns is None
            # A loop whose turns are known needs no condition.
            roles = ("body", "condition") if turns is None else ("body",)
            for part in inner(op.called(*roles)):
                total.add(part, 1 if turns is None else turns)
        elif op.kind == "conditional":
            total.conditionals += 1
            # The branch that moves the most bytes is counted, because any branch may be taken.
            branches = inner(
                op.called("branch_computations", "true_computation", "false_computation")
            )
            if branches:
                total.add(max(branches, key=lambda branch: branch.bytes))
        elif op.kind in ("call", "async-start"):
            for part in inner(op.called("to_apply", "calls")):
                total.add(part)
        else:
            total.add(_kernel(op, here, computations))
    return total


def _kernel(
    op: _Instruction, here: Computation, computations: dict[str, Computation]
) -> Counts:
    reads = [num_bytes(here[name].shape) if name in here else 0 for name in op.operands]
    writes = num_bytes(op.shape)
    if op.kind == "copy-start":  # The copy engine works beside the kernels.
        destination = re.match(r"\(([^)]*?\}),", op.shape)
        return Counts(bytes=sum(reads) + num_bytes(destination.group(1) if destination else ""))
    if op.kind in SLICES:
        reads[0] = min(reads[0], writes)
    elif op.kind == "dynamic-update-slice":
        reads[0], writes = 0, reads[1]
    elif op.kind == "fusion" and (fused := op.called("calls")):
        body = computations[fused[0]]
        reads = [min(read, _read(body, number, read)) for number, read in enumerate(reads)]
        writes = min(writes, _written(body, writes))
    calls = {}
    if op.kind == "custom-call":
        found = re.search(r'custom_call_target="([^"]+)"', op.line)
        calls = {found.group(1) if found else "unknown": 1}
        # The last result is the library's workspace, which holds no data before or after the
        # call.
        room = re.search(r"[su]8\[\d+\](\{[^}]*\})?\)$", op.shape)
        writes -= num_bytes(room.group()) if room else 0
    return Counts(kernels=1, bytes=sum(reads) + writes, custom_calls=calls)


def _read(body: Computation, number: int, whole: int) -> int:
    """The bytes that a fused computation reads of a parameter, which it may only slice."""
    place = f" parameter({number})"
    (parameter,) = (op.name for op in body.values() if place in op.line)
    waiting, found = [parameter], 0
    while waiting:
        name = waiting.pop()
        for user in body.values():
            if name not in user.operands:
                continue
            first = user.operands[0] == name and user.operands.count(name) == 1
            if user.kind in RENAMES:
                waiting.append(user.name)
            elif first and user.kind in SLICES:
                found += num_bytes(user.shape)
            elif not (first and user.kind == "dynamic-update-slice"):
                return whole
    return found


def _written(body: Computation, whole: int) -> int:
    """The bytes that a fused computation writes, which may update a part of an array."""
    root = next(op for op in body.values() if op.line.startswith("ROOT "))
    while root.kind in RENAMES:
        root = body[root.operands[0]]
    if root.kind != "dynamic-update-slice":
        return whole
    return num_bytes(body[root.operands[1]].shape)


def _turns(loop: _Instruction, computations: dict[str, Computation]) -> int | None:
    """How often a loop turns; None where the data decide."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line)
    if known:
        return int(known.group(1))
    # The TPU's compiler does not print it: a counter from 0 is below a constant.
    (condition,) = loop.called("condition")
    ops = computations[condition].values()
    numbers = [m for op in ops if (m := re.search(r"s32\[\]\S* constant\((\d+)\)", op.line))]
    compares = [op for op in ops if op.kind == "compare" and "direction=LT" in op.line]
    others = [op for op in ops if op.kind not in (*FREE, "compare")]
    if len(numbers) == len(compares) == 1 and not others:
        return int(numbers[0].group(1))
    return None


def num_bytes(shape: str) -> int:
    """The bytes of a shape, or of a tuple of them, in the device's main memory."""
    total = 0
    for kind, dims, layout in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?", shape):
        if "S(1)" in layout:  # This lies in the TPU's own fast memory.
            continue
        bits = re.search(r"\d+", kind)
        width = WIDTHS.get(kind) or (int(bits.group()) // 8 if bits else 0)
        total += width * math.prod(int(size) for size in dims.split(",") if size)
    return total
