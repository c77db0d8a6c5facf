"""Functions that users pass: the arrays that they capture become arguments.

A closure may hold arrays that are traced, batched or differentiated outside. A function with a
derivative rule of its own must receive all of them as arguments.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.extend as jex
import jax.numpy as jnp

from softjax._mesh import Layout, call_on_mesh

Callee = TypeVar("Callee", bound=Callable[..., Any])


def jit_unless_asked(
    *static: str,
    prepare_call: Callable[[dict[str, Any]], bool],
    spread: tuple[str, ...] = (),
    layout: Callable[[dict[str, Any]], Layout | None] | None = None,
) -> Callable[[Callee], Callee]:
    """Jits a function, except for calls that pass a user's function.

    `jit` would remember a user's function by its identity alone, and answer with the values
    that it once held: the caller's program traces such a call. `prepare_call` checks the
    keyword arguments, which it may replace, and returns whether a function is among them.
    `spread` and `layout` are those of `api`.
    """

    def decorate(function: Callee) -> Callee:
        def run(*args: Any, captures: bool = False, **kwargs: Any) -> Any:
            return call_on_mesh(
                function, args, kwargs, spread=spread, layout=layout, captures=captures
            )

        jitted = jax.jit(functools.wraps(function)(run), static_argnames=static)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            asks = prepare_call(kwargs)
            return run(*args, captures=True, **kwargs) if asks else jitted(*args, **kwargs)

        return cast(Callee, call)

    return decorate


def check_takes(function: Callable[..., Any], *parameters: str, name: str) -> None:
    """Refuses a function that cannot be called with as many arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # Some callables do not tell.
        return
    try:
        signature.bind(*parameters)
    except TypeError:
        raise TypeError(
            f"{name} must be a function of ({', '.join(parameters)}), got one of {signature}."
        ) from None


def hoist(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], Any]:
    """A function of (captured, *args) alone, and the arrays that `function` has captured.

    The arrays have derivatives, because they are arguments. The function is static.
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
    """A function of (floats, rest, *args), and the captured arrays of these two kinds."""
    run, captured = hoist(function, *args)
    moves = [jnp.issubdtype(x.dtype, jnp.floating) for x in captured]

    def apart(floats: Any, others: Any, *args: Any) -> Any:
        left, right = iter(floats), iter(others)
        return run(tuple(next(left if move else right) for move in moves), *args)

    pairs = list(zip(captured, moves, strict=True))
    floats = tuple(x for x, move in pairs if move)
    return apart, floats, tuple(x for x, move in pairs if not move)
