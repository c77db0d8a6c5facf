"""The loaders, on small files that the tests write."""

import gzip
import struct
import wave

import numpy as np
import pytest

from experiments import _data, _sounds

IDX_CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
MNIST = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
MNIST_TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CIFAR10 = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")


def idx_bytes(array):
    """The array as an IDX file."""
    kind = array.dtype.str[1:]
    header = struct.pack(f">HBB{array.ndim}I", 0, IDX_CODES[kind], array.ndim, *array.shape)
    return header + array.astype(f">{kind}").tobytes()


def draw_images(seed, num_images, *shape, num_classes=10):
    """Images of bytes, and labels that include the largest class."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num_images, *shape), dtype=np.uint8)
    labels = rng.integers(0, num_classes, num_images, dtype=np.uint8)
    labels[0] = num_classes - 1
    return images, labels


def cifar_bytes(images, *labels):
    """The images and label columns as a binary file of CIFAR."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([*(column[:, None] for column in labels), planes], axis=1).tobytes()


def write_mnist(folder, num_train=16, num_test=4):
    """A small MNIST; returns its training and test examples."""
    examples = draw_images(0, num_train, 28, 28), draw_images(1, num_test, 28, 28)
    for names, arrays in zip((MNIST, MNIST_TEST), examples, strict=True):
        for name, array in zip(names, arrays, strict=True):
            (folder / name).write_bytes(idx_bytes(array))
    return examples


def assert_holds(dataset, train, test):
    """The data set holds exactly these bytes, the training examples first."""
    images = np.concatenate([train[0], test[0]])
    np.testing.assert_array_equal(
        dataset.images, images.reshape(dataset.images.shape) / np.float32(255), strict=True
    )
    labels = np.concatenate([train[1], test[1]]).astype(np.int32)
    np.testing.assert_array_equal(dataset.labels, labels, strict=True)
    assert dataset.num_train == len(train[1])
    assert dataset.is_split


@pytest.mark.parametrize("kind", IDX_CODES)
def test_idx(tmp_path, kind):
    array = np.arange(-3, 21).astype(kind).reshape(2, 3, 4)
    plain, packed = tmp_path / "a-idx3", tmp_path / "a-idx3.gz"
    plain.write_bytes(idx_bytes(array))
    packed.write_bytes(gzip.compress(idx_bytes(array)))
    np.testing.assert_array_equal(_data.read_idx(plain), array, strict=True)
    np.testing.assert_array_equal(_data.read_idx(packed), array, strict=True)


GOOD_IDX = idx_bytes(np.zeros((2, 3), np.uint8))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "0 bytes are too few"),
        (b"\x00\x01" + GOOD_IDX[2:], "0x00010802 is not the magic number"),
        (b"\x00\x00\x07" + GOOD_IDX[3:], "0x00000702 is not the magic number"),
        (b"\x00\x00\x08\x00", "0x00000800 is not the magic number"),
        (GOOD_IDX[:9], "ends within its shape of 2 sizes"),
        (GOOD_IDX[:-1], r"shape \(2, 3\) takes 6 bytes of entries, not 5"),
        (GOOD_IDX + b"\x00", r"shape \(2, 3\) takes 6 bytes of entries, not 7"),
    ],
)
def test_malformed_idx(tmp_path, content, problem):
    path = tmp_path / "broken-idx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"broken-idx: .*{problem}"):
        _data.read_idx(path)


@pytest.mark.parametrize(
    "content",
    [b"not compressed", gzip.compress(GOOD_IDX, mtime=0)[:-9]],
    ids=["not compressed", "cut short"],
)
def test_malformed_gzip(tmp_path, content):
    path = tmp_path / "broken.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.gz: cannot be decompressed"):
        _data.read_idx(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist(tmp_path, suffix):
    train, test = write_mnist(tmp_path)
    if suffix:
        for name in (*MNIST, *MNIST_TEST):
            packed = gzip.compress((tmp_path / name).read_bytes())
            (tmp_path / f"{name}{suffix}").write_bytes(packed)
            (tmp_path / name).unlink()
    dataset = _data.load(tmp_path)
    assert (dataset.name, dataset.num_classes) == ("MNIST", 10)
    assert dataset.images.shape == (20, 28, 28, 1)
    assert_holds(dataset, train, test)


@pytest.mark.parametrize(
    ("name", "array", "problem"),
    [
        (MNIST[0], np.zeros((16, 28), np.uint8), "wanted uint8 of rank 3, got uint8 of rank 2"),
        (MNIST[1], np.zeros(16, np.int32), "wanted uint8 of rank 1, got int32 of rank 1"),
        (MNIST[1], np.zeros(15, np.uint8), "16 images do not go with 15 labels"),
        (MNIST_TEST[0], np.zeros((4, 9, 28), np.uint8), r"test images are not \(28, 28, 1\)"),
    ],
)
def test_malformed_mnist(tmp_path, name, array, problem):
    write_mnist(tmp_path)
    (tmp_path / name).write_bytes(idx_bytes(array))
    with pytest.raises(ValueError, match=f"{name}: {problem}"):
        _data.load(tmp_path)


def test_cifar10(tmp_path):
    batches = [draw_images(seed, 3, 32, 32, 3) for seed in range(6)]
    for name, (images, labels) in zip(CIFAR10, batches, strict=True):
        (tmp_path / name).write_bytes(cifar_bytes(images, labels))
    dataset = _data.load(tmp_path)
    assert (dataset.name, dataset.num_classes) == ("CIFAR-10", 10)
    train = tuple(np.concatenate(parts) for parts in zip(*batches[:5], strict=True))
    assert_holds(dataset, train, batches[5])


def test_cifar100(tmp_path):
    train = draw_images(0, 5, 32, 32, 3, num_classes=60)
    test = draw_images(1, 2, 32, 32, 3, num_classes=60)
    for name, (images, labels) in zip(("train.bin", "test.bin"), (train, test), strict=True):
        (tmp_path / name).write_bytes(cifar_bytes(images, labels // 5, labels))
    dataset = _data.load(tmp_path)
    assert (dataset.name, dataset.num_classes) == ("CIFAR-100", 100)  # Though none is above 59.
    assert_holds(dataset, train, test)


@pytest.mark.parametrize("num_classes", [10, 100])
def test_malformed_cifar(tmp_path, num_classes):
    images, labels = draw_images(0, 2, 32, 32, 3)
    columns = [labels] if num_classes == 10 else [labels, labels]
    path = tmp_path / "broken.bin"
    for content in (b"", cifar_bytes(images, *columns)[:-1]):
        path.write_bytes(content)
        wrong = rf"broken\.bin: {len(content)} bytes are not a whole number of rows"
        with pytest.raises(ValueError, match=wrong):
            _data.read_cifar(path, num_classes)
    columns[-1] = labels + np.uint8(num_classes)
    path.write_bytes(cifar_bytes(images, *columns))
    with pytest.raises(ValueError, match=r"broken\.bin: there is a label .* outside of \[0"):
        _data.read_cifar(path, num_classes)


def npz_arrays(**changes):
    """The arrays of a good file, or of one with changes; None leaves one out."""
    (x_train, y_train), (x_test, y_test) = (draw_images(i, 6 - i, 5, 4, 3) for i in (0, 1))
    good = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    return {name: array for name, array in {**good, **changes}.items() if array is not None}


def test_npz(tmp_path):
    arrays = npz_arrays()
    train, test = ((arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test"))
    columns = {name: arrays[name][:, None].astype(np.int64) for name in ("y_train", "y_test")}
    np.savez(tmp_path / "own.npz", **{**arrays, **columns})
    dataset = _data.load(tmp_path)
    assert (dataset.name, dataset.num_classes) == ("own.npz", 10)
    assert_holds(dataset, train, test)


def test_npz_of_floats_is_taken_as_it_is(tmp_path):
    images = np.linspace(-2, 2, 60).reshape(3, 5, 4)
    labels = np.array([0, 3, 1])
    arrays = {"x_train": images, "y_train": labels, "x_test": images[:1], "y_test": labels[:1]}
    np.savez_compressed(tmp_path / "own.npz", **arrays)
    dataset = _data.load(tmp_path)
    assert dataset.num_classes == 4
    expected = np.concatenate([images, images[:1]])[..., None].astype(np.float32)
    np.testing.assert_array_equal(dataset.images, expected, strict=True)


IMAGES, LABELS = draw_images(0, 6, 5, 4, 3)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"y_test": None, "x_test": None}, "there is no x_test, y_test"),
        ({"x_train": IMAGES.astype(np.int32)}, "images are int32, not uint8 or floats"),
        ({"x_train": IMAGES[0, 0]}, r"images of shape \(4, 3\) are not"),
        ({"x_train": IMAGES[:-1]}, "5 images do not go with 6 labels"),
        ({"x_train": IMAGES[:0], "y_train": LABELS[:0]}, "0 images do not go with 0 labels"),
        ({"x_train": np.full(IMAGES.shape, np.nan)}, "there are pixels that are not finite"),
        ({"y_train": LABELS.astype(float)}, "labels are float64"),
        ({"y_train": LABELS.astype(int) - 20}, r"there is a label \[-\d+\] outside of"),
        ({"x_train": IMAGES[:, 1:]}, r"test images are not \(4, 4, 3\): \(5, 4, 3\)"),
        ({"y_train": np.array([{}] * 6)}, "cannot be read"),
    ],
)
def test_malformed_npz(tmp_path, changes, problem):
    np.savez(tmp_path / "own.npz", **npz_arrays(**changes))
    with pytest.raises(ValueError, match=rf"own\.npz: {problem}"):
        _data.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"text"])
def test_file_that_is_no_npz(tmp_path, content):
    (tmp_path / "own.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"own\.npz: cannot be read as an \.npz file"):
        _data.load(tmp_path)


def test_array_that_is_no_npz(tmp_path):
    with (tmp_path / "own.npz").open("wb") as file:
        np.save(file, IMAGES)
    with pytest.raises(ValueError, match=r"own\.npz: cannot be read as an \.npz file"):
        _data.load(tmp_path)


def test_digits(capsys):
    dataset = _data.load()
    assert dataset.images.shape == (1797, 8, 8, 1)
    assert (dataset.images.min(), dataset.images.max()) == (0.0, 1.0)
    assert dataset.num_train == 1437
    assert not dataset.is_split
    counts = np.bincount(dataset.labels)
    np.testing.assert_array_equal(counts, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    assert capsys.readouterr().err == ""  # Nothing was asked for, so nothing is missing.


@pytest.mark.parametrize("left_over", [None, MNIST[0], "data_batch_1.bin"])
def test_a_folder_without_a_data_set_is_refused(tmp_path, left_over):
    if left_over is not None:
        (tmp_path / left_over).write_bytes(b"one file does not make a data set")
    with pytest.raises(ValueError, match="no complete data set") as caught:
        _data.load(tmp_path)
    for part in (str(tmp_path), *MNIST, *MNIST_TEST, *CIFAR10, "train.bin", "*.npz"):
        assert part in str(caught.value)


CODES = ("en", "de", "da", "sv")


def test_names():
    """Each text is there once, and belongs to one language; German capitals are small."""
    names = _data.load_names(None, CODES)
    assert names.name == _data.CLDR
    assert names.classes == ["English", "German", "Danish", "Swedish"]
    assert len(set(names.texts)) == len(names.texts) == len(names.labels) == len(names.things)
    found = dict(zip(names.texts, names.labels, strict=True))
    assert [found[text] for text in ("germany", "deutschland", "tyska", "dansk")] == [
        0,
        1,
        3,
        2,
    ]
    assert "tyskland" not in found  # Danish and Swedish share it.
    assert "Deutschland" not in found
    things = dict(zip(names.texts, names.things, strict=True))
    assert things["germany"] == things["deutschland"] != things["dansk"]
    assert (np.bincount(names.labels) > 200).all()


def test_unknown_language():
    with pytest.raises(ValueError, match="languages must be codes that babel knows"):
        _data.load_names(None, ("en", "xx"))


def test_own_names(tmp_path):
    (tmp_path / "own.tsv").write_text("b\tzwei\nä\t eins \nb\teins\n", encoding="utf-8")
    names = _data.load_names(tmp_path, CODES)
    assert names.name == "own.tsv"
    assert names.texts == ["zwei", "eins", "eins"]
    assert names.classes == ["b", "ä"]
    np.testing.assert_array_equal(names.labels, np.array([0, 1, 0], np.int32), strict=True)
    np.testing.assert_array_equal(names.things, np.array([1, 0, 0], np.int32), strict=True)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a\tx\nb y\n", "line 2 is not a label, a tabulator and a text"),
        ("a\t \n", "line 1 is not"),
        ("\tx\n", "line 1 is not"),
        ("a\tx\na\ty\n", "there is one label alone"),
        ("", "there are no characters"),
    ],
)
def test_malformed_names(tmp_path, content, problem):
    (tmp_path / "own.tsv").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"own\.tsv: {problem}"):
        _data.load_names(tmp_path, CODES)


def test_a_folder_without_names_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no file \*\.tsv"):
        _data.load_names(tmp_path, CODES)


def write_wav(path, samples, rate=8000):
    """Samples `[length, channels]` of an integer dtype, as PCM."""
    path.parent.mkdir(exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(samples.dtype.itemsize)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())


@pytest.mark.parametrize("dtype", ["u1", "<i2", "<i4"])
@pytest.mark.parametrize("num_channels", [1, 2])
def test_wav(tmp_path, dtype, num_channels):
    """The mean of the channels; bytes are centred at 128."""
    samples = np.random.default_rng(0).integers(0, 256, (50, num_channels)).astype(dtype)
    write_wav(tmp_path / "a.wav", samples, rate=11025)
    read, rate = _sounds.read_wav(tmp_path / "a.wav")
    expected = samples.astype(float).mean(axis=1) - (128 if dtype == "u1" else 0)
    np.testing.assert_array_equal(read, expected, strict=True)
    assert rate == 11025


def test_sounds(tmp_path):
    tones = [np.full((3 + n, 1), n, np.int16) for n in range(3)]
    for name, tone in zip(("b/1", "b/0", "a/0"), tones, strict=True):
        write_wav(tmp_path / f"{name}.wav", tone)
    sounds = _sounds.load_sounds(tmp_path)
    assert (sounds.rate, sounds.classes) == (8000, ["a", "b"])
    np.testing.assert_array_equal(sounds.labels, np.array([0, 1, 1], np.int32), strict=True)
    assert [len(samples) for samples in sounds.samples] == [5, 4, 3]
    write_wav(tmp_path / "b" / "2.wav", tones[0], rate=16000)
    with pytest.raises(ValueError, match=r"2\.wav: 16000 samples per second, others have 8000"):
        _sounds.load_sounds(tmp_path)


def test_malformed_sounds(tmp_path):
    with pytest.raises(ValueError, match=r"fewer than two folders with files \*\.wav"):
        _sounds.load_sounds(tmp_path)
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF and no more")
    with pytest.raises(ValueError, match=r"a\.wav: cannot be read as a WAV file"):
        _sounds.read_wav(path)
    write_wav(path, np.zeros((0, 1), np.int16))
    with pytest.raises(ValueError, match=r"a\.wav: there are no samples"):
        _sounds.read_wav(path)
    write_wav(path, np.zeros((4, 3), np.uint8).view("V3")[:, :1])
    with pytest.raises(ValueError, match=r"a\.wav: samples of 3 bytes; wanted 1, 2 or 4"):
        _sounds.read_wav(path)


@pytest.mark.parametrize("packed", [False, True])
def test_text(tmp_path, packed, capsys):
    characters = "Zwölf Boxkämpfer\r\n🙂 ≥ ½\n"
    content = characters.encode()
    name = "own.txt.gz" if packed else "own.txt"
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    assert _data.load_text(tmp_path) == (name, characters)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + content)  # A byte order mark.
    assert _data.load_text(tmp_path) == ("a.txt", characters)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "there are no characters"),
        (b"abc\xff", "not UTF-8, invalid start byte at byte 3"),
        ("abc é".encode()[:-1], "not UTF-8, unexpected end of data at byte 4"),
        ("abc é".encode("latin-1") + b"  ", "not UTF-8, invalid continuation byte at byte 4"),
    ],
    ids=["empty", "invalid", "cut short", "latin-1"],
)
def test_malformed_text(tmp_path, content, problem):
    (tmp_path / "own.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"own\.txt: {problem}"):
        _data.load_text(tmp_path)


def test_reference(capsys):
    text = _data.load_text()
    assert text == _data.load_text()
    assert text.name == _data.REFERENCE
    assert len(text.characters) > 400_000
    assert text.characters.startswith('The "assert" statement')
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("folder", [".", "nowhere"])
def test_a_folder_without_a_text_is_refused(tmp_path, folder):
    (tmp_path / "text.md").write_bytes(b"of another kind")
    with pytest.raises(ValueError, match=r"no file \*\.txt") as caught:
        _data.load_text(tmp_path / folder)
    assert str(tmp_path / folder) in str(caught.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no complete data set"):
        _data.load(tmp_path / "nowhere")


def test_shuffled_digits():
    """Each seed has all digits once, in an order of its own, with the labels that they have."""
    data, digits = _data.shuffled_digits(np.random.default_rng(0), 2), _data.digits()
    images = np.concatenate([data.images, data.test_images], axis=1)
    labels = np.concatenate([data.labels, data.test_labels], axis=1)
    assert data.labels.shape == (2, digits.num_train)
    known = np.column_stack([digits.images.reshape(-1, 64), digits.labels])
    for seed in range(2):
        found = np.column_stack([images[seed], labels[seed]])
        np.testing.assert_array_equal(np.unique(found, axis=0), np.unique(known, axis=0))
    assert not np.array_equal(*labels)
