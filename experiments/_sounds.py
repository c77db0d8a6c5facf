"""Sounds with labels, from WAV files in folders by class, and the formants of a vowel."""

import wave
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments._data import require
from experiments._run import NDArray

__all__ = ["Sounds", "formants", "load_sounds", "read_wav"]

PCM_DTYPES = {1: "u1", 2: "<i2", 4: "<i4"}  # By the bytes of a sample.


class Sounds(NamedTuple):
    """Samples of every sound `[length]`, at one rate in Hz, and its class."""

    samples: list[NDArray]
    rate: int
    labels: NDArray  # int32 `[n]`
    classes: list[str]


def load_sounds(data_dir: Path) -> Sounds:
    """The files *.wav of every folder inside of the folder; a folder is a class.

    Raises:
        ValueError: fewer than two folders hold sounds, or the rates of two files differ.
    """
    paths = sorted(data_dir.glob("*/*.wav"))
    classes = sorted({path.parent.name for path in paths})
    require(len(classes) > 1, data_dir, "fewer than two folders with files *.wav")
    sounds = [read_wav(path) for path in paths]
    rate = sounds[0][1]
    for path, (_, other) in zip(paths, sounds, strict=True):
        require(other == rate, path, f"{other} samples per second, others have {rate}")
    labels = np.array([classes.index(path.parent.name) for path in paths], np.int32)
    return Sounds([samples for samples, _ in sounds], rate, labels, classes)


def read_wav(path: Path) -> tuple[NDArray, int]:
    """The samples of a WAV file (PCM), the mean of its channels, and their rate in Hz.

    Raises:
        ValueError: the file cannot be read; the message names it.
    """
    try:
        with wave.open(str(path)) as file:
            width, num_channels, rate = (
                file.getsampwidth(),
                file.getnchannels(),
                file.getframerate(),
            )
            data = file.readframes(file.getnframes())
    except (EOFError, wave.Error) as error:
        raise ValueError(f"{path}: cannot be read as a WAV file ({error}).") from error
    require(width in PCM_DTYPES, path, f"samples of {width} bytes; wanted 1, 2 or 4")
    samples = np.frombuffer(data, PCM_DTYPES[width]).astype(float)
    require(samples.size > 0, path, "there are no samples")
    return samples.reshape(-1, num_channels).mean(axis=1) - 128 * (width == 1), rate


def formants(samples: NDArray, rate: int, order: int = 12) -> NDArray:
    """The first three resonances, in Hz, of the middle 50 ms, by linear prediction.

    Each sample is predicted from the `order` samples before it, at 11 kHz. The predictor is
    the inverse of an all-pole filter: a pair of poles near the unit circle is a resonance.
    """
    if rate > 11000:
        spectrum = np.fft.rfft(samples)[: len(samples) * 11000 // (2 * rate) + 1]
        samples, rate = np.fft.irfft(spectrum), 11000
    middle, half = len(samples) // 2, rate // 40
    frame = samples[max(0, middle - half) : middle + half]
    frame = np.diff(frame) + 0.03 * frame[1:]  # High tones are weaker in a voice: raise them.
    frame = frame * np.hamming(len(frame))
    autocorrelation = np.correlate(frame, frame, "full")[len(frame) - 1 :][: order + 1]
    lags = np.abs(np.subtract.outer(np.arange(order), np.arange(order)))
    matrix = autocorrelation[lags] + 1e-9 * autocorrelation[0] * np.eye(order)
    poles = np.roots([1, *-np.linalg.solve(matrix, autocorrelation[1:])])
    frequencies = np.angle(poles) * rate / (2 * np.pi)
    bandwidths = -np.log(np.abs(poles)) * rate / np.pi
    found = np.sort(frequencies[(frequencies > 90) & (bandwidths < 700)])
    if len(found) < 3:
        raise ValueError(f"There are {len(found)} resonances in a sound; 3 are needed.")
    return found[:3]
