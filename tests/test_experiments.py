"""The experiments: every script runs, writes what it promises, and judges itself."""

import dataclasses
import html.parser
import importlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
import time
import wave

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from experiments import __main__ as command_line
from experiments import (
    _cartpole,
    _checkpoints,
    _choice,
    _gallery,
    _plots,
    _report,
    _run,
    _sounds,
    _training,
    attention,
    blobs,
    classification,
    language_model,
    languages,
    my_map,
    toy,
    vowels,
)
from experiments._networks import Layer, cnn, mlp, orthogonal

NAMES = tuple(command_line.questions())
FIGURES = {
    "argmax": {"limits", "sharing", "simplex", "training"},
    "attention": {"accuracy", "curves", "weights"},
    "bandit": {"exploration", "gradient", "parameters"},
    "blobs": {"curves", "regions"},
    "calibration": {"reliability", "sets"},
    "cartpole": {"return"},
    "classification": {"confusion", "curves"},
    "confidence": {"scale", "training"},
    "gumbel_vae": {"nelbo", "reconstructions"},
    "language_model": {"loss"},
    "languages": {"confusion", "training"},
    "long_tail": {"recall", "training"},
    "my_map": {"map"},
    "open_set": {"auroc", "confidence"},
    "outliers": {"losses", "rates"},
    "precision": {"precision"},
    "toy": {"loss", "steps"},
    "vowels": {"learning", "vowels"},
}
IMPOSSIBLE = {
    "argmax": {"min_accuracy": 1.01},
    "attention": {"min_recall": 1.01},
    "bandit": {"tolerance": -0.01},
    "blobs": {"max_loss": -1.0},
    "calibration": {"min_fall": 1.01},
    "cartpole": {"min_return": 501.0},
    "classification": {"min_mlp_accuracy": 1.01},
    "confidence": {"max_gap": -1.0},
    "gumbel_vae": {"max_nelbo": -1.0},
    "language_model": {"max_loss": -1.0},
    "languages": {"min_accuracy": 1.01},
    "long_tail": {"min_gain": 1.01},
    "my_map": {"max_error": -1.0},
    "open_set": {"min_auroc": 1.01},
    "outliers": {"min_clean": 1.01},
    "precision": {"max_ulps": -1.0},
    "toy": {"min_rows_right": 8},
    "vowels": {"max_excess": -1.0},
}


@pytest.fixture(autouse=True)
def promotion_of_optax():
    """Lets integers meet floats, because Adam raises floats to integer powers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def launch(name, folder, *options):
    """Runs a script as `python -m experiments` does; its exit code and its run folder."""
    exit_code = command_line.main([name, "--quick", "--out", str(folder), *options])
    (run_folder,) = (folder / name).iterdir()
    return exit_code, run_folder


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def png_bytes(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# The command line.


def test_every_script_asks_a_question(capsys):
    assert set(NAMES) == set(FIGURES)
    assert command_line.main([]) == 0
    listing = capsys.readouterr().out
    for name, question in command_line.questions().items():
        assert question.endswith("?")
        assert f"  {name} " in listing
        assert question in listing


def test_unknown_name(capsys):
    assert command_line.main(["clasification"]) == 2
    error = capsys.readouterr().err
    assert "no experiment 'clasification'" in error
    assert all(name in error for name in NAMES)


@pytest.mark.parametrize(
    "options",
    [
        ["toy", "--no-such-option"],
        ["toy", "--num-seeds", "0"],
        ["toy", "--row", "8"],
        ["blobs", "--maps", "sparsemax"],
        ["bandit", "--num-runs", "0"],
        ["blobs", "--num-test", "1000"],
        ["attention", "--num-symbols", "3"],
        ["attention", "--num-pairs", "5", "--mesh", "context=4"],
        ["attention", "--maps", "sparsemax", "--mesh", "context=4"],
        ["bandit", "--learners", "mellowmax"],
        ["cartpole", "--num-updates", "3"],
        ["confidence", "--dtypes", "bfloat16"],
        ["calibration", "--level", "1"],
        ["open_set", "--known", "1"],
        ["outliers", "--rates", "0.1"],
        ["classification", "--maps"],
        ["classification", "--maps", "softmx"],
        ["vowels", "--sizes", "50"],
        ["language_model", "--window", "0"],
        ["language_model", "--mesh", "rows=2"],
        ["language_model", "--mesh", "data=0,vocab=2"],
        ["language_model", "--processes", "2"],
        ["language_model", "--batch-size", "7", "--mesh", "data=2"],
        ["gumbel_vae", "--num-latents", "0"],
        ["gumbel_vae", "--arms"],
    ],
)
def test_wrong_options(tmp_path, capsys, options):
    with pytest.raises(SystemExit) as caught:
        command_line.main([*options, "--out", str(tmp_path)])
    assert caught.value.code == 2
    assert options[1].removeprefix("--").replace("-", "_") in capsys.readouterr().err.replace(
        "-", "_"
    )
    assert not any(tmp_path.iterdir())


# Whole runs.


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "toy" else pytest.mark.slow) for n in NAMES]
)
def test_quick_run(tmp_path, capsys, name):
    exit_code, folder = launch(name, tmp_path, "--check", "--seed", "0")
    assert exit_code == 0

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["seed"], config["quick"], config["out"]) == (0, True, str(tmp_path))
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    assert environment["command"].startswith(f"python -m experiments {name} --quick")
    assert environment["versions"]["jax"] == jax.__version__
    assert environment["device"].endswith(jax.devices()[0].device_kind)
    assert {"commit", "seconds"} < set(environment)

    records = read_lines(folder / "metrics.jsonl")
    measures = [record for record in records if "measure" in record]
    assert any(measure["passed"] for measure in measures)
    assert not any(measure["passed"] is False for measure in measures)
    printed = capsys.readouterr().out
    assert all(measure["measure"] in printed for measure in measures)
    assert all(word in printed for word in ("measure", "target", "got", "pass", str(folder)))

    with np.load(folder / "arrays.npz") as archive:
        arrays = dict(archive)
    curves = {key: array for key, array in arrays.items() if key.startswith("curves/")}
    # `precision` and `my_map` train nothing; the others judge trained models.
    untrained = "precision", "my_map"
    assert curves or name in ("calibration", "open_set", "outliers", "vowels", *untrained)
    for key, array in curves.items():
        _, arm, measure = key.split("/")
        assert array.shape[0] == config["num_seeds"]
        logged = [record[measure] for record in records if record.get("arm") == arm]
        np.testing.assert_array_equal(logged, array.mean(axis=0))
        assert np.isfinite(array).all()

    # Every target can be missed: the stated one when it asks too much, all of them by NaN.
    script = importlib.import_module(f"experiments.{name}")
    reduced = script.Config.reduced()
    greedy = dataclasses.replace(reduced, **IMPOSSIBLE[name])
    assert [measure.passed for measure in script.judge(greedy, arrays)].count(False) >= 1
    spoilt = {
        key: np.full_like(array, np.nan) if array.dtype.kind == "f" else array
        for key, array in arrays.items()
    }
    assert not any(measure.passed for measure in script.judge(reduced, spoilt))

    # The arrays alone are enough to draw every picture again.
    figures = script.draw(arrays)
    assert set(figures) == FIGURES[name] == {path.stem for path in folder.glob("*.png")}
    for stem, figure in figures.items():
        assert png_bytes(figure) == (folder / f"{stem}.png").read_bytes()
        assert figure.get_suptitle()  # The caption.
        for panel in figure.axes:
            has_ticks = len(panel.get_xticks()) > 0
            assert not (panel.axison and has_ticks) or panel.get_xlabel() or panel.get_ylabel()


@pytest.mark.parametrize(("options", "expected"), [(["--check"], 1), ([], 0)])
def test_missed_target(tmp_path, capsys, options, expected):
    hopeless = ["--num-seeds", "1", "--num-steps", "1"]
    exit_code, folder = launch("toy", tmp_path, *hopeless, *options)
    assert exit_code == expected
    assert False in [record.get("passed") for record in read_lines(folder / "metrics.jsonl")]
    assert " NO " in capsys.readouterr().out


@pytest.mark.slow
def test_seed_decides_all():
    config = toy.Config(num_seeds=2, num_steps=3)
    first, again = toy.run(config), toy.run(config)
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name], strict=True)
    curve = "curves/softmax/loss"
    assert not np.array_equal(first[curve][0], first[curve][1])
    other = toy.run(toy.Config(seed=1, num_seeds=2, num_steps=3))
    assert not np.array_equal(first[curve], other[curve])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparsemax", "expm1max"])
def test_classification_of_own_images(tmp_path, name):
    """Other data than the digits train too, and are not held to the digits' targets."""
    images = np.random.default_rng(0).random((12, 6, 6, 3))
    labels = np.arange(12) % 3
    arrays = {"x_train": images, "y_train": labels, "x_test": images[:4], "y_test": labels[:4]}
    np.savez(tmp_path / "own.npz", **arrays)
    config = classification.Config(
        num_seeds=2,
        data_dir=tmp_path,
        networks=("cnn",),
        maps=(name,),
        num_epochs=2,
        batch_size=4,
    )
    result = classification.run(config)
    assert result["data"] == "own.npz"
    assert result[f"confusion/cnn, {name}"].sum() == 2 * 4
    accuracy, control = classification.judge(config, result)
    assert accuracy.passed is None
    assert control.passed is not None


def run_language_model(folder, text):
    """A short run on a text of one's own, and its configuration."""
    (folder / "own.txt").write_bytes(text.encode())
    config = language_model.Config(
        num_seeds=2,
        data_dir=folder,
        window=3,
        num_embedding=4,
        num_hidden=32,
        num_features=16,
        num_rounds=3,
        num_control_rounds=1,
        num_steps=60,
        batch_size=32,
        learning_rate=0.02,
        sample_length=14,
        temperature=0.0,
    )
    return config, language_model.run(config)


@pytest.mark.slow
def test_language_model_of_own_text(tmp_path):
    """A text that repeats itself is learnt by heart, from its first nine tenths alone."""
    text = "äéîõü\n" * 100
    config, arrays = run_language_model(tmp_path, text)
    assert arrays["data"] == "own.txt"
    loss, *_, shuffled = language_model.judge(config, arrays)
    assert loss.passed is None  # The target is for Python's reference.
    assert loss.got < 0.05
    assert shuffled.passed
    assert "\nõü\näéîõü\näéîõü\n" in language_model.tell(arrays)

    _, others = run_language_model(tmp_path, text[:540] + text[540:][::-1])
    first, second = (run["curves/text/train_loss"] for run in (arrays, others))
    np.testing.assert_array_equal(first, second)
    first, second = (run["curves/text/validation_loss"] for run in (arrays, others))
    assert first.shape == second.shape == (config.num_seeds, config.num_rounds)
    assert (second[:, -1] > 1).all()


def loss_curve(config, tokens):
    """The losses of training on the mesh of the options, and the model."""
    with jax.set_mesh(config.make_mesh()):
        state, losses = language_model._start(config, 7), []
        for number in range(config.num_rounds):
            state, loss = language_model._train(state, jnp.int32(number), tokens, config)
            losses.append(np.asarray(loss))
    for head in (state.model.head, state.optimizer[0].mu.head):
        num_seeds, num_classes, _ = head.sharding.shard_shape(head.shape)
        assert (num_seeds, num_classes) == (2, head.shape[1] // config.sizes["vocab"])
    return np.array(losses), _checkpoints.fetch(state.model)


def test_language_model_on_a_mesh():
    """Seven classes on two devices, beside one of padding: the losses are those of one."""
    tokens = np.arange(400, dtype=np.int32) % 7
    sizes = {"num_embedding": 4, "num_hidden": 16, "num_features": 16}
    options = {"num_rounds": 2, "num_steps": 20, "batch_size": 8, "learning_rate": 0.02}
    config = language_model.Config(num_seeds=2, window=3, **sizes, **options)
    wanted, alone = loss_curve(config, tokens)
    assert wanted[1].max() < wanted[0].min()
    got, model = loss_curve(dataclasses.replace(config, mesh="data=2,vocab=2"), tokens)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(model.head[:, :7], alone.head, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(model.head[:, 7], 0)


class StoppedError(Exception):
    """A run is stopped."""


def stopping_at(last):
    """A `Track` that stops before the round `last`, of all arms together."""
    numbers = iter(range(last))

    def track(steps, label):
        for step in steps:
            if next(numbers, None) is None:
                raise StoppedError
            yield step

    return track


@pytest.mark.slow
def test_language_model_is_resumed(tmp_path, capsys):
    """From any round, and from the checkpoint before a damaged one, with the same arrays."""
    config, wanted = run_language_model(tmp_path, "äéîõü\n" * 100)
    for last in range(4):
        with pytest.raises(StoppedError):
            language_model.run(config, stopping_at(last), tmp_path / str(last))
        if last == 2:
            newest = tmp_path / "2" / "checkpoints" / "text" / "000002.npz"
            newest.write_bytes(newest.read_bytes()[:-1])
        got = language_model.run(config, folder=tmp_path / str(last))
        assert ("000002.npz is damaged" in capsys.readouterr().err) == (last == 2)
        assert got.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(got[name], array, strict=True, err_msg=name)


SMALL = {
    **{"num-seeds": 2, "window": 3, "num-embedding": 4, "num-hidden": 32, "num-features": 16},
    **{"num-rounds": 4, "num-control-rounds": 2, "num-steps": 60, "batch-size": 32},
    **{"learning-rate": 0.02, "sample-length": 14},
}


def run_in_a_process(*options):
    """The process of a run of the language model."""
    command = [sys.executable, "-m", "experiments", "language_model", *map(str, options)]
    root = command_line.FOLDER.parent
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=root, **pipes)


def killed_and_resumed(folder, moments, *options):
    """The arrays of a run that is killed as soon as each of these checkpoints is there."""
    options = [*options, "--out", folder]
    for moment in moments:
        with run_in_a_process(*options) as process:
            while not list(folder.glob(f"*/*/checkpoints/{moment}")):
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.01)
            process.kill()
        (run,) = folder.glob("*/*")
        options = ["--resume", run]
        assert not (run / "arrays.npz").exists()
    with run_in_a_process(*options) as process:
        text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    (run,) = folder.glob("*/*")
    with np.load(run / "arrays.npz") as archive:
        return dict(archive)


@pytest.mark.slow
def test_language_model_is_killed(tmp_path):
    """The curves are those of a run that was not; in two processes, but for rounding."""
    (tmp_path / "own.txt").write_text("äéîõü\n" * 100, encoding="utf-8")
    small = [f"--{name}={value}" for name, value in SMALL.items()]
    options = ["--quick", *small, "--data-dir", tmp_path]
    wanted = killed_and_resumed(tmp_path / "whole", [], *options)
    moments = ["text/000002.npz"]
    got = killed_and_resumed(tmp_path / "killed", moments, *options)
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name], array, strict=True, err_msg=name)
    spread = ["--mesh", "data=2,vocab=2", "--processes", "2"]
    got = killed_and_resumed(tmp_path / "two", moments, *options, *spread)
    for name in (name for name in wanted if name.startswith("curves/")):
        np.testing.assert_allclose(got[name], wanted[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", "1"], "takes the options of that run"),
        (["--mesh", "vocab=2"], "takes the options of that run"),
        ([], "that is a run of toy, not language_model"),
        ([], "no run can be resumed from there"),
    ],
)
def test_what_cannot_be_resumed(tmp_path, options, words):
    name = "toy" if "toy" in words else "language_model"
    command = f"python -m experiments {name} --quick --num-seeds 1"
    if "no run" not in words:
        text = json.dumps({"command": command})
        (tmp_path / "environment.json").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=words):
        command_line.main(["language_model", "--resume", str(tmp_path), *options])


def state_of_a_run(number):
    array = jnp.arange(5, dtype="float32") + number
    return {"array": array, "rest": (np.full((2, 3), np.nan), jnp.int32(number))}


def test_checkpoints(tmp_path, capsys):
    start = state_of_a_run(0)
    assert _checkpoints.restore(tmp_path / "none", start) == (0, start)
    assert _checkpoints.restore(None, start) == (0, start)
    for number in (1, 2, 3):
        _checkpoints.save(tmp_path, number, state_of_a_run(number))
    (tmp_path / "part").write_bytes(b"of a run that was killed while it wrote")
    newest = tmp_path / "000003.npz"
    assert sorted(tmp_path.glob("*.npz")) == [tmp_path / "000002.npz", newest]
    number, state = _checkpoints.restore(tmp_path, start)
    assert number == 3
    assert_same_state(state, 3)
    assert not capsys.readouterr().err

    # Whichever byte is damaged, it is noticed, or it changes nothing.
    whole = newest.read_bytes()
    damaged = [whole[:i] + bytes([255 - whole[i]]) + whole[i + 1 :] for i in range(len(whole))]
    noticed = 0
    for content in (b"", whole[: len(whole) // 2], whole[:-1], *damaged[::3]):
        newest.write_bytes(content)
        number, state = _checkpoints.restore(tmp_path, start)
        assert_same_state(state, number)
        error = capsys.readouterr().err
        assert (f"{newest} is damaged and is not used: " in error) == (number == 2)
        noticed += number == 2
    assert noticed > len(damaged) / 6

    (tmp_path / "000002.npz").unlink()
    newest.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"No checkpoint in {tmp_path} can be used"):
        _checkpoints.restore(tmp_path, start)


def assert_same_state(state, number):
    for got, wanted in zip(*map(jax.tree.leaves, (state, state_of_a_run(number))), strict=True):
        assert type(got) is type(wanted)
        np.testing.assert_array_equal(got, wanted, strict=True)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            {"array": jnp.zeros(4, "float32")},
            r"array has dtype float32 and shape \(5,\), wanted",
        ),
        ({"array": jnp.zeros(5, "int32")}, r"array has dtype float32 and shape \(5,\), wanted"),
        ({"more": jnp.zeros(4)}, r"it holds array, rest\.0, rest\.1, wanted array, more, "),
    ],
)
def test_checkpoints_of_another_program(tmp_path, capsys, other, words):
    _checkpoints.save(tmp_path, 1, state_of_a_run(1))
    with pytest.raises(ValueError, match="No checkpoint"):
        _checkpoints.restore(tmp_path, state_of_a_run(0) | other)
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("context", ["ring", "allgather"])
def test_recall_over_devices(context):
    """The curves are those of one device, but for rounding."""
    maps = ("softmax", "sink") if context == "ring" else ("sparsemax",)
    sizes = {"num_pairs": 4, "num_symbols": 4, "num_features": 8, "batch_size": 8}
    steps = {"num_rounds": 2, "retrieval_steps": 1, "recall_steps": 10, "num_test": 8}
    options = {"lengths": (4,), "num_items": 4, "gain_length": 4, **sizes, **steps}
    config = attention.Config(num_seeds=2, maps=maps, **options)
    wanted = attention.run(config)
    got = attention.run(dataclasses.replace(config, mesh="context=4", context=context))
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(got[name], array, rtol=0, atol=1e-5, err_msg=name)


def test_languages_of_own_names(tmp_path):
    """Other names are told apart, and are not held to the targets of the CLDR."""
    rng = np.random.default_rng(0)
    spell = lambda letters: "".join(rng.choice(list(letters), 5))
    rows = [f"{n}\t{spell(letters)}" for n, letters in (("ab", "abc"), ("no", "nop")) * 30]
    (tmp_path / "own.tsv").write_text("\n".join(rows), encoding="utf-8")
    config = languages.Config(num_seeds=2, data_dir=tmp_path, num_buckets=64, num_steps=20)
    arrays = languages.run(config)
    assert arrays["classes"].tolist() == ["ab", "no"]
    assert (arrays["top-1/softmax"] == 1).all()
    *rest, control = languages.judge(config, arrays)
    assert [measure.passed for measure in rest] == [None] * len(rest)
    assert control.passed is not None
    assert "ab and no (0)" in languages.tell(arrays)


def test_pieces_of_a_name():
    """One bucket for each piece of one to four letters, marks of both ends included."""
    config = languages.Config(num_buckets=2**20)
    bag = languages.bag("aé", config)
    counts = np.sort(bag[bag > 0])
    # "^aé$" has 4 + 3 + 2 + 1 pieces, all of them different.
    np.testing.assert_allclose(counts, np.full(10, 0.1**0.5), rtol=1e-6)
    assert (languages.bag("aa", config) > 0).sum() == 9  # Its letter "a" is there twice.


def speak(frequencies, rate, pitch=110, seconds=0.2):
    """A vowel: pulses of a voice through a resonator for each formant."""
    samples = np.zeros(int(seconds * rate))
    samples[:: rate // pitch] = 1.0
    for frequency in (*frequencies, 3700.0, 4600.0):
        radius = np.exp(-np.pi * (60 + 0.03 * frequency) / rate)
        cosine = np.cos(2 * np.pi * frequency / rate)
        samples = scipy.signal.lfilter([1], [1, -2 * radius * cosine, radius**2], samples)
    return scipy.signal.lfilter([1], [1, -0.97], samples)  # The voice itself is dull.


@pytest.mark.parametrize("rate", [10000, 16000, 44100])
@pytest.mark.parametrize("vowel", ["heed", "had", "hod", "who'd", "heard"])
def test_formants(vowel, rate):
    """Linear prediction finds the resonances that a vowel was made with.

    A voice has energy at the multiples of its pitch alone, which are the places that a peak can
    be moved to: it is known to half of the pitch.
    """
    frequencies, pitch = vowels.MEANS[vowels.VOWELS.index(vowel), 0], 110
    found = _sounds.formants(speak(frequencies, rate, pitch), rate)
    np.testing.assert_allclose(found, frequencies, rtol=0, atol=pitch / 2)


def test_too_few_formants():
    with pytest.raises(ValueError, match="resonances"):
        _sounds.formants(np.sin(np.arange(2000.0)), 8000, order=2)


@pytest.mark.slow
def test_vowels_of_own_sounds(tmp_path):
    """Folders of sounds are classes; their best rule is unknown, so nothing is judged."""
    rng = np.random.default_rng(0)
    for name in ("heed", "hod"):
        (tmp_path / name).mkdir()
        for number in range(9):
            means = vowels.MEANS[vowels.VOWELS.index(name), 0]
            sound = speak(means * np.exp(0.03 * rng.normal(size=3)), 16000)
            samples = np.int16(2e4 * sound / np.abs(sound).max())
            with wave.open(str(tmp_path / name / f"{number}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(16000)
                file.writeframes(samples.tobytes())
    config = vowels.Config(num_seeds=2, data_dir=tmp_path, num_steps=20)
    arrays = vowels.run(config)
    assert arrays["classes"].tolist() == ["heed", "hod"]
    assert arrays["confusion"].sum() == 2 * 6
    measures = vowels.judge(config, arrays)
    assert [measure.passed for measure in measures] == [None, None]
    assert all(measure.got == 0 for measure in measures)
    assert set(vowels.draw(arrays)) == {"vowels"}


def test_rule_of_bayes():
    """On drawn frames it is calibrated: its mean confidence is its accuracy."""
    frames = vowels.draw_frames(np.random.default_rng(0), 20000)
    for is_told in (False, True):
        logits = vowels.bayes(frames, is_told)
        probs = np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
        is_right = logits.argmax(axis=-1) == frames.vowels
        assert abs(probs.max(axis=-1).mean() - is_right.mean()) < 4 * 0.5 / 20000**0.5


def test_language_model_needs_a_text_to_be_judged_on(tmp_path):
    with pytest.raises(ValueError, match=r"window of 3 needs 31 characters; own\.txt has 30"):
        run_language_model(tmp_path, "abc" * 10)


# Measures and progress.


@pytest.mark.parametrize(
    ("values", "summary", "got"),
    [
        ([1, 2, 9], "mean", 4),
        ([1, 2, 9], "median", 2),
        ([1, 2, 9], "min", 1),
        ([1, 2, 9], "max", 9),
    ],
)
def test_measure(values, summary, got):
    def passed(**targets):
        return _run.Measure("m", values, summary=summary, **targets).passed

    assert _run.Measure("m", values, summary=summary).got == got
    assert passed() is None
    assert passed(at_least=got) is passed(at_most=got) is True
    assert passed(at_least=got + 0.1) is passed(at_most=got - 0.1) is False
    assert passed(at_least=got - 1, at_most=got + 1) is True
    assert passed(at_least=got - 2, at_most=got - 1) is False


def test_measure_of_nan_never_passes():
    for targets in ({"at_least": -math.inf}, {"at_most": math.inf}):
        assert _run.Measure("m", [0.0, math.nan], **targets).passed is False


def test_measure_row():
    measure = _run.Measure("accuracy", [0.5, 0.7], at_least=0.65)
    assert measure.row() == ("accuracy", "≥ 0.65", "0.6 ± 0.1 (mean of 2)", "NO")
    measure = _run.Measure("loss", 0.25, at_most=0.25)
    assert measure.row() == ("loss", "≤ 0.25", "0.25", "yes")
    assert _run.Measure("time", [1, 2, 4], summary="median").row()[1:] == (
        "",
        "2 (median of 3)",
        "",
    )


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress(monkeypatch, capsys, is_terminal):
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(is_terminal)))
    with _run._progress() as track:
        assert list(track(range(3), "an arm")) == [0, 1, 2]
    error = capsys.readouterr().err
    assert "an arm" in error
    assert ("3/3" in error) == is_terminal
    assert (error == "an arm: 3 of 3 in 0.0 s\n") == (not is_terminal)


def test_commit_is_none_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _run._commit() is None


# The parts.


@pytest.mark.parametrize("name", blobs.MAPS)
def test_loss_goes_with_its_map(name):
    """A map's own loss has the gradient p - y, and is zero just where p = y."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 2, (20, 5))).at[0, 0].add(1000)
    labels = jnp.asarray(rng.integers(0, 5, 20)).at[0].set(0)
    output_map = blobs.MAPS[name]
    losses, gradient = jax.vmap(jax.value_and_grad(output_map.loss))(logits, labels)
    error = output_map.probs(logits) - jax.nn.one_hot(labels, 5, dtype=logits.dtype)
    np.testing.assert_allclose(gradient, error, atol=1e-14)
    np.testing.assert_array_equal(losses > 0, np.abs(error).max(axis=-1) > 0)
    assert losses[0] == 0


def test_loss_of_the_map_of_ones_own():
    """Its gradient is p - y, and it is zero just where p = y."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 2, (20, 5))).at[0, 0].add(1000)
    labels = jnp.asarray(rng.integers(0, 5, 20)).at[0].set(0)
    with jax.numpy_rank_promotion("allow"):
        losses = my_map.expm1max_loss(logits, labels)
        gradient = jax.grad(lambda z: my_map.expm1max_loss(z, labels).sum())(logits)
        probs = np.asarray(my_map.expm1max(logits))
    np.testing.assert_allclose(probs, my_map._by_sorting(np.asarray(logits)), atol=1e-14)
    error = probs - np.eye(5)[labels]
    np.testing.assert_allclose(gradient, error, atol=1e-14)
    np.testing.assert_array_equal(losses > 1e-14, np.abs(error).max(axis=-1) > 1e-14)


@pytest.mark.parametrize("size", [pytest.param(8, marks=pytest.mark.slow), 7])
def test_cnn_is_a_convolution(size):
    """The patches, the maxima and the layout agree with JAX's own convolution."""
    network = cnn((size, size, 2), [3, 4], 5, 6)
    layers = network.init(jax.random.key(0))
    shift = jax.random.normal(jax.random.key(1), (6,))
    layers = [Layer(weights, bias + shift[: len(bias)]) for weights, bias in layers]
    images = jax.random.normal(jax.random.key(2), (3, size, size, 2))
    hidden = images
    for weights, bias in layers[:2]:
        kernel = weights.reshape(3, 3, -1, weights.shape[-1])
        layout = ("NHWC", "HWIO", "NHWC")
        hidden = jax.lax.conv_general_dilated(
            hidden, kernel, (1, 1), "SAME", dimension_numbers=layout
        )
        hidden = jax.nn.relu(hidden + jnp.broadcast_to(bias, hidden.shape))
        window = (1, 2, 2, 1)
        hidden = jax.lax.reduce_window(hidden, -jnp.inf, jax.lax.max, window, window, "VALID")
    expected = mlp([4 * (size // 4) ** 2, 5, 6]).apply(layers[2:], hidden)
    np.testing.assert_allclose(network.apply(layers, images), expected, rtol=1e-12, atol=1e-12)


def test_he_uniform():
    layers = mlp([50, 200, 3]).init(jax.random.key(0))
    for layer, fan_in in zip(layers, (50, 200), strict=True):
        limit = math.sqrt(6 / fan_in)
        assert 0.95 * limit < jnp.max(jnp.abs(layer.weights)) <= limit
        assert abs(jnp.mean(layer.weights)) < limit / 10
        np.testing.assert_array_equal(layer.bias, jnp.zeros(layer.weights.shape[1]))


def test_area_under_the_roc():
    """By its definition, the share of pairs in order; ties count half."""
    positive, negative = np.random.default_rng(0).integers(0, 9, (2, 30))
    pairs = np.subtract.outer(positive, negative)
    expected = np.mean(pairs > 0) + np.mean(pairs == 0) / 2
    np.testing.assert_allclose(_training.auroc(positive, negative), expected, rtol=1e-15)


def test_orthogonal_start():
    """Columns, or rows where these are fewer, are orthogonal, and as long as the scale."""
    layers = orthogonal(jax.random.key(0), [4, 8, 2], last_scale=0.01)
    for (weights, bias), scale in zip(layers, (2**0.5, 0.01), strict=True):
        tall = weights if weights.shape[0] > weights.shape[1] else weights.T
        np.testing.assert_allclose(tall.T @ tall, scale**2 * np.eye(tall.shape[1]), atol=1e-14)
        np.testing.assert_array_equal(bias, 0)


def test_carts_start_anew_where_they_are_done():
    key, done = jax.random.key(0), jnp.array([False, True])
    state = _cartpole.State(jnp.ones((2, 4)), jnp.full(2, 9, jnp.int32))
    motion, time = _cartpole.restart(key, state, done)
    np.testing.assert_array_equal(motion[0], 1)
    np.testing.assert_array_equal(motion[1], _cartpole.reset(key, (2,)).motion[1])
    np.testing.assert_array_equal(time, [9, 0])


@pytest.mark.slow
def test_classification_trains_on_the_training_rows_alone(tmp_path):
    """Other labels of the test images change what is measured, and no weight."""
    images = np.random.default_rng(0).random((16, 4, 4, 1))
    labels = np.arange(16) % 2
    config = classification.Config(
        num_seeds=2,
        data_dir=tmp_path,
        networks=("mlp",),
        maps=("softmax",),
        num_epochs=2,
        batch_size=4,
    )

    def result(test_labels):
        arrays = {"x_train": images[:12], "y_train": labels[:12]}
        arrays |= {"x_test": images[12:], "y_test": test_labels}
        np.savez(tmp_path / "own.npz", **arrays)
        return classification.run(config)

    first, second = result(labels[12:]), result(1 - labels[12:])
    curve = "curves/mlp, softmax/"
    np.testing.assert_array_equal(first[f"{curve}train_loss"], second[f"{curve}train_loss"])
    accuracies = [run[f"{curve}test_accuracy"] for run in (first, second)]
    np.testing.assert_allclose(accuracies[0] + accuracies[1], 1, rtol=1e-6)
    assert not np.array_equal(*first[f"{curve}train_loss"])  # The seeds differ.
    right = np.trace(first["confusion/mlp, softmax"])
    np.testing.assert_allclose(right, 4 * accuracies[0][:, -1].sum(), rtol=1e-6)
    for name in ("train_loss", "test_loss", "test_accuracy"):
        assert first[curve + name].shape == (2, 2)


@pytest.mark.parametrize(
    ("script", "options"),
    [
        (classification, {"num_epochs": 0}),
        (classification, {"batch_size": 0}),
        (classification, {"batch_size": 1438}),
        (blobs, {"num_epochs": 0}),
        (blobs, {"batch_size": 751}),
    ],
)
def test_training_on_nothing_is_refused(script, options):
    (option,) = options
    with pytest.raises(ValueError, match=f"{option} must be"):
        script.run(script.Config(**options))


def test_toy_steps():
    """The worked example of the tutorials, to the eight digits that they print."""
    steps = toy.steps_by_hand(jnp.array([2.33, -1.46, 0.56]), jnp.array(0))
    expected = np.array([0.83827314, 0.01894129, 0.14278557])
    np.testing.assert_allclose(steps.probs, expected, atol=5e-9)
    np.testing.assert_allclose(steps.total, math.exp(2.33) + math.exp(-1.46) + math.exp(0.56))
    np.testing.assert_allclose(steps.loss, -math.log(0.83827314), atol=1e-8)
    np.testing.assert_allclose(steps.gradient, expected - np.array([1, 0, 0]), atol=5e-9)


def test_toy_tells_every_step():
    told = toy.tell(toy.run(toy.Config(num_seeds=1, num_steps=1, row=5)))
    assert told.startswith("Row 5 (0, 22, 565, 44, 1), of class 3")
    assert told.count("probs") == 2
    assert "0.333333    0.333333   -0.666667" in told  # The gradient before training.


def test_blobs_points():
    config = blobs.Config(num_points=4000)
    points, labels = blobs.draw_points(3, 2, config)
    assert points.shape == (2, 4000, 2)
    for centre, (x, y) in enumerate(blobs.CENTRES):
        cloud = points[labels == centre]
        assert len(cloud) == 2000
        np.testing.assert_allclose(cloud.mean(axis=0), (x, y), atol=5 * 1.5 / math.sqrt(2000))
        np.testing.assert_allclose(cloud.std(axis=0), 1.5, rtol=5 / math.sqrt(4000))
    assert not np.array_equal(labels[0], labels[1])


# Pictures.


def test_exact_zeros_have_a_place_on_a_logarithmic_axis():
    figure, (panel,) = _plots.panels(["a"], "caption")
    _plots.lines(panel, np.arange(1, 4), np.array([[1e-3, 1.0, 0.0]]), "arm", 0)
    _plots.finish(panel, "x", "y", y_scale="log", whole=True)
    figure.canvas.draw()
    assert panel.get_yscale() == "symlog"
    assert "0" in [text.get_text() for text in panel.get_yticklabels()]
    assert all(tick == int(tick) for tick in panel.get_xticks())


def test_numbers_differ_from_their_cells():
    for cells, low in ((np.array([[0.0, 1.0]]), 0), (np.array([[-1.0, 0.0, 1.0]]), -1)):
        figure, (panel,) = _plots.panels(["a"], "caption")
        options = {"x": "x", "y": "y", "scale": "share", "low": low}
        image = _plots.heatmap(
            figure, panel, cells, **options, numbers=cells.astype(str).tolist()
        )
        for text, value in zip(panel.texts, cells[0], strict=True):
            shade = np.mean(image.cmap(image.norm(value))[:3])
            ink = {"black": 0, "white": 1}[text.get_color()]
            assert abs(shade - ink) > 0.5
        assert [axes.get_ylabel() for axes in figure.axes] == ["y", "share"]
    assert min(image.cmap(image.norm(0.0))[:3]) > 0.95  # No sign, no colour.


@pytest.mark.parametrize("apart", [("loss",), ("loss", "test_loss")])
def test_losses_apart(apart):
    """Each arm has a panel for the losses of its own unit, where no two curves look alike."""
    curves = {
        f"curves/{arm}/{measure}": np.ones((2, 3))
        for arm in range(7)
        for measure in (*apart, "accuracy")
    }
    figure = _plots.curves(curves, "step", "caption", apart=apart)
    accuracy, *losses = figure.axes
    assert accuracy.get_title() == "accuracy"
    assert [panel.get_title() for panel in losses] == [f"{arm}: loss" for arm in range(7)]
    for panel in figure.axes:
        named = [line for line in panel.lines if not line.get_label().startswith("_")]
        assert len({line.get_color() for line in named}) == len(named)
    assert all(panel.get_legend() for panel in losses) is (len(apart) > 1)


def test_powers_of_two_are_fractions():
    figure, (panel,) = _plots.panels(["a"], "caption")
    _plots.lines(panel, np.array([1 / 128, 4]), np.ones((1, 2)), "arm", 0)
    _plots.finish(panel, "x", "y", x_scale="log2")
    figure.canvas.draw()
    shown = {text.get_text() for text in panel.get_xticklabels()}
    assert {"1/64", "1/16", "1", "4"} <= shown


def test_confusion_in_per_cent():
    """Rows sum to 1 whatever their counts; small shares and long lists are left out."""
    figure, (panel, many) = _plots.panels(["a", "b"], "caption")
    counts = np.array([[199, 1, 0], [2, 6, 0], [0, 0, 0]])
    _plots.confusion(figure, panel, counts, ["one", "two", "three"], what="class")
    assert [text.get_text() for text in panel.texts] == ["100", "", "", "25", "75", *[""] * 4]
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("class predicted", "class")
    _plots.confusion(figure, many, np.eye(21), range(21), what="class")
    assert not many.texts


def test_legend_names_each_arm_once():
    figure, axes = _plots.panels(["a", "b"], "caption")
    for panel in axes:
        for number, arm in enumerate(("one", "two")):
            _plots.lines(panel, np.arange(3), np.ones((2, 3)), arm, number)
    _plots.legend(figure)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]
    assert (
        len(
            {
                line.get_linestyle()
                for line in axes[0].lines
                if line.get_label() in ("one", "two")
            }
        )
        == 2
    )


# All experiments, and the report.


class Page(html.parser.HTMLParser):
    """The tags of a page with their attributes, and whether all of them are closed."""

    def __init__(self):
        super().__init__()
        self.tags, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag, name):
        return [attributes.get(name) for found, attributes in self.tags if found == tag]


def test_all_and_report(tmp_path, capsys):
    """In processes of their own; the page needs nothing that it does not hold."""
    flags = ["--quick", "--check", "--out", str(tmp_path)]
    assert _gallery.main(["toy"], flags) == 0
    assert command_line.main(["report", "--out", str(tmp_path)]) == 0
    assert "1 of" in capsys.readouterr().out.splitlines()[-1]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert not page.open
    assert page.all("a", "href") == ["#toy"]
    assert page.all("section", "id") == ["toy"]
    pictures = page.all("img", "src")
    assert len(pictures) == len(list(tmp_path.glob("*/*/*.png")))
    assert all(source.startswith("data:image/png;base64,") for source in pictures)
    assert all(page.all("img", "alt"))
    assert "http" not in text
    assert command_line.questions()["toy"] in text
    assert "targets were reached" in text

    # A target that is missed is named.
    (path,) = tmp_path.glob("toy/*/metrics.jsonl")
    records = read_lines(path)
    judged = [record for record in records if record.get("passed") is not None]
    judged[0]["passed"] = False
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    assert command_line.main(["report", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"1 of {len(judged)} targets were missed: {judged[0]['measure']}" in text
    assert "<strong>NO</strong>" in text


BROWSER = shutil.which("chromium")
PHONE = 380  # pixels

# The page tells its frame, which is as wide as a phone, what a reader would see of it.
PROBE = """<script>addEventListener("load", () => parent.postMessage({
  width: document.documentElement.scrollWidth,
  pictures: [...document.images].map(picture => picture.naturalWidth),
}, "*"))</script>"""
FRAME = f"""<!DOCTYPE html><iframe src="page.html" style="width: {PHONE}px; border: 0"></iframe>
<script>addEventListener("message", told => document.body.textContent =
  JSON.stringify(told.data))</script>"""


def seen_by_a_browser(text, folder):
    """The width of the page, the widths of its pictures, and what the console says."""
    (folder / "page.html").write_text(text.replace("</body>", PROBE + "</body>"))
    (folder / "frame.html").write_text(FRAME)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    flags += ["--virtual-time-budget=20000", f"--user-data-dir={folder / 'profile'}"]
    command = [BROWSER, *flags, "--dump-dom", (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    body = done.stdout.partition("<body>")[2].partition("</body>")[0]
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(body), errors


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs the browser chromium")
def test_report_in_a_browser(tmp_path):
    """No error, no horizontal scroll on a phone, and every picture is loaded."""
    runs = tmp_path / "runs"
    for script in ("toy", "argmax"):
        assert _gallery.main([script], ["--quick", "--out", str(runs)]) == 0
    assert command_line.main(["report", "--out", str(runs)]) == 0
    text = (runs / "report.html").read_text(encoding="utf-8")
    seen, errors = seen_by_a_browser(text, tmp_path)
    assert not errors
    assert seen["width"] <= PHONE
    assert len(seen["pictures"]) == len(list(runs.glob("*/*/*.png")))
    assert all(seen["pictures"])

    # A page with all three faults is seen to have them.
    bad = '<img src="none.png"><div style="width: 999px">.</div><script>none()</script>'
    seen, errors = seen_by_a_browser(text.replace("</main>", bad + "</main>"), tmp_path)
    assert "none is not defined" in errors[0]
    assert seen["width"] > PHONE
    assert seen["pictures"][-1] == 0


def test_readme_is_current():
    """Its table of experiments is what the scripts and the kept figures give."""
    text = _report.README.read_text(encoding="utf-8")
    docstrings = _choice.docstrings_in(command_line.FOLDER)
    figures = json.loads(_report.FIGURES.read_text(encoding="utf-8"))
    assert set(figures) <= set(docstrings)
    assert _report.readme_with(text, docstrings, figures) == text


def test_report_writes_the_readme(tmp_path, monkeypatch, capsys):
    """With the figures of runs at full size alone; the others stay."""
    copy, figures = tmp_path / "README.md", tmp_path / "figures.json"
    copy.write_text(_report.README.read_text(encoding="utf-8"), encoding="utf-8")
    figures.write_text('{"blobs": "as it was", "gone": "no script"}', encoding="utf-8")
    monkeypatch.setattr(_report, "README", copy)
    monkeypatch.setattr(_report, "FIGURES", figures)
    for name, is_quick in (("toy", False), ("precision", True)):
        folder = tmp_path / "runs" / name / "20260101"
        folder.mkdir(parents=True)
        measures = [_run.Measure("free", 1.0), _run.Measure("rows", 6.0, at_least=7.0)]
        weak = _run.Measure("more than 0", 1.0, at_least=0.0)
        measures = [json.dumps(m.record()) for m in (weak, *measures)]
        (folder / "metrics.jsonl").write_text("\n".join(measures), encoding="utf-8")
        (folder / "config.json").write_text(json.dumps({"quick": is_quick}), encoding="utf-8")
        made = {"versions": {}, "command": "", "seconds": 1, "device": "", "commit": ""}
        (folder / "environment.json").write_text(json.dumps(made), encoding="utf-8")
        (folder / "pictures.json").write_text("{}", encoding="utf-8")
    assert command_line.main(["report", "--readme", "--out", str(tmp_path / "runs")]) == 0
    figure = "rows: 6; 1/2"
    assert json.loads(figures.read_text(encoding="utf-8")) == {
        "blobs": "as it was",
        "toy": figure,
    }
    text = copy.read_text(encoding="utf-8")
    question = command_line.questions()["toy"]
    assert f"| `toy` | {question} | {figure} |\n" in text
    assert f"| `precision` | {command_line.questions()['precision']} |  |\n" in text
    assert "2 of" in capsys.readouterr().out


def test_report_of_no_run(tmp_path, capsys):
    assert command_line.main(["report", "--out", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().out


def test_all_fails_with_one_that_fails(tmp_path, capsys):
    assert _gallery.main(["no_such_script"], ["--quick", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert "There is no experiment 'no_such_script'" in printed
