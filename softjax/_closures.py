"""Functions that users pass: what they capture becomes an argument.

A closure may hold arrays that are traced, batched or differentiated outside. A rule with
derivatives of its own must receive all of them as arguments. And outside of `jit` what it holds
may change from call to call: then it is another function.
"""

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp


def hoist(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], Any]:
    """A function of (captured, *args) alone, and the arrays that `function` has captured.

    They become arguments, and so have derivatives; the result is static.
    """
    closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
    structure = jax.tree.structure(out)

    def run(captured: Any, *args: Any) -> Any:
        whole = jex.core.ClosedJaxpr(closed.jaxpr, captured)
        leaves = jex.core.jaxpr_as_fun(whole)(*jax.tree.leaves(args))
        return jax.tree.unflatten(structure, leaves)

    return run, tuple(jnp.asarray(x) for x in closed.consts)


def hoist_floats(
    function: Callable[..., Any], *args: Any
) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]:
    """A function of (floats, others, *args), and what it captured, in these two kinds."""
    run, captured = hoist(function, *args)
    moves = [jnp.issubdtype(x.dtype, jnp.floating) for x in captured]

    def apart(floats: Any, others: Any, *args: Any) -> Any:
        left, right = iter(floats), iter(others)
        return run(tuple(next(left if move else right) for move in moves), *args)

    pairs = list(zip(captured, moves, strict=True))
    floats = tuple(x for x, move in pairs if move)
    return apart, floats, tuple(x for x, move in pairs if not move)


class Captured:
    """What functions hold in cells, globals, defaults and attributes, as a key for `jit`.

    Two are equal if each holds the same objects, or equal Python numbers and strings: `jit`
    itself knows a function by its identity alone, and would answer with what it once held.
    """

    def __init__(self, *functions: Any) -> None:
        self._values = tuple(x for function in functions for x in _held(function, set()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Captured) or len(self._values) != len(other._values):
            return False
        return all(map(_same, self._values, other._values))

    def __hash__(self) -> int:
        return hash(len(self._values))


def _same(one: Any, other: Any) -> bool:
    plain = type(one) is type(other) and isinstance(one, (int, float, complex, str, bytes))
    return one is other or (plain and one == other)


def _held(function: Any, seen: set[int]) -> Iterator[Any]:
    if isinstance(function, jax.tree_util.Partial):
        # (What else it holds are arguments of `jit`, as are the leaves of other trees.)
        yield from _held(function.func, seen)
    elif isinstance(function, functools.partial):
        yield from _opened((function.args, function.keywords))
        yield from _held(function.func, seen)
    elif isinstance(function, types.MethodType):
        yield from _opened((vars(function.__self__),))
        yield from _held(function.__func__, seen)
    elif isinstance(function, types.FunctionType):
        yield from _held_by_code(function, seen)
    elif jax.tree_util.all_leaves([function]) and hasattr(function, "__dict__"):
        yield from _opened((vars(function),))
        yield from _held(type(function).__call__, seen)


def _held_by_code(function: types.FunctionType, seen: set[int]) -> Iterator[Any]:
    seen.add(id(function))
    cells = [_content(cell) for cell in function.__closure__ or ()]
    names = [n for n in _names(function.__code__) if n in function.__globals__]
    globals_ = [function.__globals__[name] for name in names]
    defaults = (function.__defaults__, function.__kwdefaults__)
    for value in _opened((cells, globals_, *defaults)):
        yield value
        # Functions beside it, in the same module, are looked into too.
        beside = isinstance(value, types.FunctionType) and id(value) not in seen
        if beside and value.__globals__ is function.__globals__:
            yield from _held_by_code(value, seen)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # Not bound yet.
        return None


def _names(code: types.CodeType) -> Iterator[str]:
    """The names that code looks up, and the code of functions within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _opened(containers: Any) -> Iterator[Any]:
    """All entries, and those of lists, tuples and dictionaries among them."""
    for container in containers:
        entries = container.values() if isinstance(container, dict) else container or ()
        for entry in entries:
            yield entry
            if isinstance(entry, (dict, list, tuple)):
                yield from entry.values() if isinstance(entry, dict) else entry
