"""Images and names with labels, and text: sets from Python packages, or your own files.

Images are scikit-learn's digits, or MNIST, CIFAR and .npz files; names are those of languages
and territories in the Unicode CLDR, as the package babel ships them, or a .tsv file; text is
Python's reference, or a UTF-8 file. Nothing is downloaded. A folder given as
`--data-dir` is searched for the files of each data set in turn, under the names that they are
published by. A folder without a complete set, or a malformed file, is an error.
"""

import gzip
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
from babel import Locale, UnknownLocaleError

from experiments._run import NDArray

__all__ = [
    "CLDR",
    "REFERENCE",
    "Dataset",
    "Names",
    "Split",
    "Text",
    "cldr_names",
    "digits",
    "load",
    "load_names",
    "load_text",
    "read_cifar",
    "read_idx",
    "read_npz",
    "read_text",
    "read_tsv",
    "reference",
    "require",
    "shuffled_digits",
]

REFERENCE = "Python's reference"
CLDR = "names in the Unicode CLDR"

# Images, `[n, height, width, channels]` or as they are read, and labels, `[n]`.
Examples = tuple[NDArray, NDArray]


class Dataset(NamedTuple):
    """Images `[n, height, width, channels]`, float32, and labels `[n]`, int32."""

    name: str
    images: NDArray
    labels: NDArray
    num_classes: int
    num_train: int
    is_split: bool  # Whether the first `num_train` rows, and no others, are for training.


class Split(NamedTuple):
    """Flat images `[seeds, n, pixels]` and labels `[seeds, n]`, to train on and to test on."""

    images: Any  # Arrays of NumPy, or such as JAX traces.
    labels: Any
    test_images: Any
    test_labels: Any


class Text(NamedTuple):
    """Characters in the order in which they are read."""

    name: str
    characters: str


class Names(NamedTuple):
    """Short texts. Each has a class, and names a thing that texts of other classes name too."""

    name: str
    texts: list[str]
    labels: NDArray  # int32 `[n]`
    things: NDArray  # int32 `[n]`
    classes: list[str]


class _Source(NamedTuple):
    name: str
    files: tuple[str, ...]
    read: Callable[..., Dataset]


def load(data_dir: Path | None = None) -> Dataset:
    """The first data set that is complete in the folder; the digits where none is named.

    Raises:
        ValueError: the folder holds no complete data set; the message lists the files of each.
    """
    if data_dir is None:
        return digits()
    for source in _SOURCES:
        paths = [_find(data_dir, name) for name in source.files]
        if all(path is not None for path in paths):
            return source.read(*paths)
    wanted = "; ".join(f"{source.name}: {', '.join(source.files)}" for source in _SOURCES)
    raise ValueError(f"{data_dir}: no complete data set, which is one of: {wanted}.")


def digits() -> Dataset:
    """1797 handwritten digits, 8 x 8; a fifth of them, any fifth, is for testing."""
    # Imported here, because it takes a second that scripts without images need not wait for.
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    return Dataset("digits", images, labels.astype(np.int32), 10, 1437, is_split=False)


def shuffled_digits(rng: np.random.Generator, num_seeds: int) -> Split:
    """The digits in an order of its own for each seed, four fifths of them for training."""
    data = digits()
    rows = np.stack([rng.permutation(len(data.labels)) for _ in range(num_seeds)])
    images, labels = data.images.reshape(len(rows[0]), -1)[rows], data.labels[rows]
    parts = (np.split(array, [data.num_train], axis=1) for array in (images, labels))
    (images, test_images), (labels, test_labels) = parts
    return Split(images, labels, test_images, test_labels)


def load_text(data_dir: Path | None = None) -> Text:
    """The first file *.txt in the folder; Python's reference where none is named.

    Raises:
        ValueError: the folder holds no such file.
    """
    if data_dir is None:
        return reference()
    path = _find(data_dir, "*.txt")
    if path is None:
        raise ValueError(f"{data_dir}: no file *.txt.")
    return Text(path.name, read_text(path))


def reference() -> Text:
    """The topics that `help()` knows, in the order of their names; they come with Python."""
    return Text(REFERENCE, "\n\n".join(topics[name] for name in sorted(topics)))


def load_names(data_dir: Path | None, languages: Sequence[str]) -> Names:
    """The first file *.tsv in the folder; names in the CLDR where no folder is named.

    Raises:
        ValueError: the folder holds no such file, or there is no such language.
    """
    if data_dir is None:
        return cldr_names(languages)
    path = _find(data_dir, "*.tsv")
    if path is None:
        raise ValueError(f"{data_dir}: no file *.tsv.")
    rows = read_tsv(path)
    classes = sorted({label for label, _ in rows})
    labels = np.array([classes.index(label) for label, _ in rows], np.int32)
    things = np.unique([text for _, text in rows], return_inverse=True)[1].astype(np.int32)
    return Names(path.name, [text for _, text in rows], labels, things, classes)


def cldr_names(languages: Sequence[str]) -> Names:
    """What languages and territories are called in each language, by its code.

    Case is left out. So are things that one of the languages has no name for, and names that
    several of them spell alike, since these have no one answer.
    """
    try:
        locales = [Locale.parse(code) for code in languages]
    except (UnknownLocaleError, ValueError) as error:
        raise ValueError(f"languages must be codes that babel knows: {error}.") from error
    tables = [
        {**{f"language {k}": v for k, v in locale.languages.items()}, **locale.territories}
        for locale in locales
    ]
    uses: dict[str, list[tuple[int, int]]] = {}  # By text: its languages, and its things.
    for thing, key in enumerate(sorted(set.intersection(*map(set, tables)))):
        for label, table in enumerate(tables):
            uses.setdefault(table[key].lower(), []).append((label, thing))
    # A text that names two things of one language, such as a country and its language, is
    # kept once, so that it cannot be both trained on and tested.
    rows = [
        (text, *found[0])
        for text, found in uses.items()
        if len({label for label, _ in found}) == 1
    ]
    texts, labels, things = zip(*rows, strict=True)
    english = [locale.english_name or locale.language for locale in locales]
    numbers = np.array(labels, np.int32), np.array(things, np.int32)
    return Names(CLDR, list(texts), *numbers, english)


def read_tsv(path: Path) -> list[tuple[str, str]]:
    """A label and a text from each line of a UTF-8 file, with a tab between them.

    Raises:
        ValueError: a line is not of this form, or there is one label alone.
    """
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        label, tabulator, text = line.partition("\t")
        require(
            bool(tabulator and label.strip() and text.strip()),
            path,
            f"line {number} is not a label, a tabulator and a text",
        )
        rows.append((label.strip(), text.strip()))
    require(len({label for label, _ in rows}) > 1, path, "there is one label alone")
    return rows


def read_text(path: Path) -> str:
    """The characters of a UTF-8 file, plain or compressed (.gz), without a byte order mark.

    Raises:
        ValueError: the file is empty or not UTF-8; the message names it and the place.
    """
    try:
        characters = _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"{path}: not UTF-8, {error.reason} at byte {error.start}."
        raise ValueError(problem) from error
    require(len(characters) > 0, path, "there are no characters")
    return characters


def read_idx(path: Path) -> NDArray:
    """The array in an IDX file, plain or compressed (.gz).

    Two zero bytes, a byte for the dtype and one for the rank; then the shape, as big-endian
    32-bit integers; then the entries, big-endian, in row-major order.

    Raises:
        ValueError: the magic number or the size is wrong; the message names the file.
    """
    data = _read_bytes(path)
    require(len(data) >= 4, path, f"{len(data)} bytes are too few for an IDX file")
    zeros, code, rank = struct.unpack(">HBB", data[:4])
    require(
        zeros == 0 and code in _IDX_DTYPES and rank > 0,
        path,
        f"0x{data[:4].hex()} is not the magic number of an IDX file",
    )
    start = 4 + 4 * rank
    require(len(data) >= start, path, f"the file ends within its shape of {rank} sizes")
    shape = struct.unpack(f">{rank}I", data[4:start])
    dtype = np.dtype(_IDX_DTYPES[code])
    wanted, got = int(np.prod(shape, dtype=object)) * dtype.itemsize, len(data) - start
    require(wanted == got, path, f"shape {shape} takes {wanted} bytes of entries, not {got}")
    return (
        np.frombuffer(data, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))
    )


def read_cifar(path: Path, num_classes: int) -> Examples:
    """Images `[n, 32, 32, 3]` and labels `[n]` of one file of CIFAR-10 or CIFAR-100 (binary).

    A row has one byte for the label, and then the red, green and blue planes of the image. In
    CIFAR-100 a byte with the coarse label comes first; it is left out.

    Raises:
        ValueError: the size is wrong or a label is too large; the message names the file.
    """
    data = _read_bytes(path)
    num_labels = 1 if num_classes == 10 else 2
    row_size = num_labels + 3 * 32 * 32
    require(
        len(data) > 0 and len(data) % row_size == 0,
        path,
        f"{len(data)} bytes are not a whole number of rows of {row_size}",
    )
    rows = np.frombuffer(data, np.uint8).reshape(-1, row_size)
    labels = rows[:, num_labels - 1]
    _check_labels(path, labels, num_classes)
    return rows[:, num_labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def read_npz(path: Path) -> dict[str, NDArray]:
    """The arrays x_train, y_train, x_test and y_test of an .npz file, as Keras names them.

    Raises:
        ValueError: the file cannot be read or lacks one of them; the message names the file.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in _NPZ_NAMES if name in archive}
    except (EOFError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read as an .npz file ({error}).") from error
    missing = [name for name in _NPZ_NAMES if name not in arrays]
    require(not missing, path, f"there is no {', '.join(missing)}")
    return arrays


def _mnist(*paths: Path) -> Dataset:
    arrays = [read_idx(path) for path in paths]
    for path, array, rank in zip(paths, arrays, (3, 1, 3, 1), strict=True):
        got = f"{array.dtype} of rank {array.ndim}"
        is_wanted = array.dtype == np.uint8 and array.ndim == rank
        require(is_wanted, path, f"wanted uint8 of rank {rank}, got {got}")
    train = _checked(paths[1], arrays[0], arrays[1])
    return _dataset("MNIST", train, _checked(paths[3], arrays[2], arrays[3]), paths[2])


def _cifar(name: str, num_classes: int, *paths: Path) -> Dataset:
    *train, test = (_checked(path, *read_cifar(path, num_classes)) for path in paths)
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    dataset = _dataset(name, (images, labels), test, paths[-1])
    return dataset._replace(num_classes=num_classes)


def _npz(path: Path) -> Dataset:
    arrays = read_npz(path)
    train = _checked(path, arrays["x_train"], arrays["y_train"])
    return _dataset(path.name, train, _checked(path, arrays["x_test"], arrays["y_test"]), path)


def _checked(path: Path, images: NDArray, labels: NDArray) -> Examples:
    """Images as float32 `[n, height, width, channels]`, bytes in [0, 1]; labels as int32."""
    if labels.ndim == 2 and labels.shape[1] == 1:  # Keras keeps CIFAR's labels as a column.
        labels = labels[:, 0]
    is_byte, is_float = images.dtype == np.uint8, np.issubdtype(images.dtype, np.floating)
    require(is_byte or is_float, path, f"images are {images.dtype}, not uint8 or floats")
    require(images.ndim in (3, 4), path, f"images of shape {images.shape} are not [n, h, w, c]")
    _check_labels(path, labels)
    num_images, num_labels = len(images), len(labels)
    problem = f"{num_images} images do not go with {num_labels} labels"
    require(num_images == num_labels > 0, path, problem)
    pixels = images.astype(np.float32) / np.float32(255 if is_byte else 1)
    require(np.isfinite(pixels).all(), path, "there are pixels that are not finite")
    return pixels.reshape(*images.shape[:3], -1), labels.astype(np.int32)


def _check_labels(path: Path, labels: NDArray, num_classes: int | None = None) -> None:
    is_integer = np.issubdtype(labels.dtype, np.integer) and labels.ndim == 1
    require(is_integer, path, f"labels are {labels.dtype} {labels.shape}, not integers [n]")
    below = np.inf if num_classes is None else num_classes
    wrong = labels[(labels < 0) | (labels >= below)]
    require(not wrong.size, path, f"there is a label {wrong[:1]} outside of [0, {below})")


def _dataset(name: str, train: Examples, test: Examples, test_path: Path) -> Dataset:
    shapes = train[0].shape[1:], test[0].shape[1:]
    require(shapes[0] == shapes[1], test_path, f"test images are not {shapes[0]}: {shapes[1]}")
    images, labels = (np.concatenate(parts) for parts in zip(train, test, strict=True))
    return Dataset(name, images, labels, int(labels.max()) + 1, len(train[1]), is_split=True)


def _find(folder: Path, name: str) -> Path | None:
    """The file of that name, or pattern, in the folder; else the same with .gz."""
    found = sorted(folder.glob(name)) or sorted(folder.glob(f"{name}.gz"))
    return found[0] if found else None


def _read_bytes(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: cannot be decompressed ({error}).") from error


def require(condition: bool | np.bool_, path: Path, problem: str) -> None:
    """Refuses a file, by its name, with the problem that it has."""
    if not condition:
        raise ValueError(f"{path}: {problem}.")


_IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_NPZ_NAMES = ("x_train", "y_train", "x_test", "y_test")
_MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_CIFAR10_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
_SOURCES = (
    _Source("MNIST", _MNIST_FILES, _mnist),
    _Source("CIFAR-10", _CIFAR10_FILES, lambda *paths: _cifar("CIFAR-10", 10, *paths)),
    _Source(
        "CIFAR-100", ("train.bin", "test.bin"), lambda *paths: _cifar("CIFAR-100", 100, *paths)
    ),
    _Source("one of your own", ("*.npz",), _npz),
)
