"""Checkpoints: a run that is killed at any moment goes on from the last of them.

A checkpoint is a NumPy archive. It is written beside its place and moved there once it is on
the disk, so that a file at its place is complete. NumPy archives hold a checksum of each array,
so that a file that was damaged later is noticed; the checkpoint before it is then used.

Arrays that are spread over devices are gathered in every process, whose memory must hold the
state. The first process writes the file; all of them read it, so that all must see the folder.
"""

import os
import sys
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import numpy.typing as npt
from jax.experimental import multihost_utils

__all__ = ["fetch", "restore", "save"]

KEPT = 2  # Checkpoints that stay: the newest, and the one before, should the newest be damaged.

Tree = TypeVar("Tree")


def fetch(tree: Tree) -> Tree:
    """The arrays as NumPy arrays, whichever devices and processes they are spread over."""

    def gather(x: Any) -> Any:
        is_spread = isinstance(x, jax.Array)  # A NumPy array is the same in all processes.
        return multihost_utils.process_allgather(x, tiled=True) if is_spread else x

    return jax.tree.map(gather, tree)


def save(folder: Path | None, number: int, state: Any) -> None:
    """Keeps the state after so many rounds; does nothing without a folder."""
    if folder is None:
        return
    arrays = _by_name(fetch(state))
    if jax.process_index() > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "part"
    with part.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / f"{number:06}.npz")
    for path in sorted(folder.glob("*.npz"))[:-KEPT]:
        path.unlink()


def restore(folder: Path | None, start: Tree) -> tuple[int, Tree]:
    """The number of finished rounds, and the state after them, in the form of `start`.

    Without a checkpoint, this is 0 and `start` itself.

    Raises:
        ValueError: there are checkpoints, but none can be used.
    """
    paths = sorted(folder.glob("*.npz"), reverse=True) if folder else []
    for path in paths:
        try:
            return int(path.stem), _read(path, start)
        except Exception as error:  # Damage shows in many ways.
            print(f"{path} is damaged and is not used: {error}", file=sys.stderr)
    if paths:
        raise ValueError(
            f"No checkpoint in {folder} can be used; without any, a run starts anew."
        )
    return 0, start


def _read(path: Path, start: Tree) -> Tree:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        arrays = dict(archive)
    wanted = _by_name(start)
    if arrays.keys() != wanted.keys():
        raise ValueError(f"it holds {', '.join(arrays)}, wanted {', '.join(wanted)}.")
    for name, x in wanted.items():
        there = arrays[name]
        if (there.dtype, there.shape) != (x.dtype, x.shape):
            raise ValueError(
                f"{name} has dtype {there.dtype} and shape {there.shape}, wanted {x.dtype} and"
                f" {x.shape}."
            )
    leaves = [_placed_like(x, arrays[name]) for name, x in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(start), leaves)


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def _placed_like(leaf: Any, values: Any) -> npt.NDArray[Any] | jax.Array:
    """The values on the devices that the leaf is on."""
    if not isinstance(leaf, jax.Array):
        return values
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda part: values[part])
