"""Two processes on this machine that train together, and what one sees when the other fails.

Each test starts this module as a program, in one process with four devices or in two with two
devices each.
"""

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import softjax as sj
from experiments import _processes

ROOT = Path(__file__).parent.parent
LIMIT = 60  # Seconds after which a process ends, whatever happens.
HEARTBEAT = 4  # Seconds after which a process that is not heard counts as dead.
STUCK = 5  # Seconds for which a process waits for one that is heard, but does not come.
NUM_STEPS, FOREVER = 3, 10**6


# The program.


def output_layer(put):
    """Features and weights, whose classes are spread over the devices, and their loss."""
    rng = np.random.default_rng(0)
    features = put(rng.standard_normal((16, 8), np.float32), P())
    weights = put(rng.standard_normal((64, 8), np.float32), P("devices", None))
    labels = put(rng.integers(0, 64, 16), P())
    loss = jax.shard_map(
        lambda x, w, y: sj.linear_cross_entropy(x, w, y, axis_name="devices", block_size=8),
        in_specs=(P(), P("devices", None), P()),
        out_specs=P(),
    )
    return (features, weights), lambda *floats: loss(*floats, labels)


def ring(put):
    """Queries, keys and values of tokens that are spread over the devices."""
    tokens = P("devices")
    rng = np.random.default_rng(0)
    queries, keys, values = (
        put(rng.standard_normal((32, 2, 8), np.float32), tokens) for _ in range(3)
    )
    attend = jax.shard_map(
        lambda q, k, v: sj.attention(q, k, v, mask=sj.masks.Causal(), axis_name="devices"),
        in_specs=(tokens, tokens, tokens),
        out_specs=tokens,
    )
    return (queries, keys, values), lambda q, k, v: jnp.mean(jnp.sin(attend(q, k, v)))


PROBLEMS = {"output layer": output_layer, "ring": ring}


def work(name, num_steps, flag):
    """Steps down the gradient of a loss; the file `flag` makes the second process stick."""
    signal.alarm(LIMIT)
    jax.config.update("jax_platforms", "cpu")
    _processes.connect(4, heartbeat_seconds=HEARTBEAT)
    print("ADDRESS", os.environ.get("JAX_COORDINATOR_ADDRESS"), flush=True)
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,))
    jax.set_mesh(mesh)

    def put(x, spec):
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])

    floats, loss = PROBLEMS[name](put)

    @jax.jit
    def step(floats):
        value, slopes = jax.value_and_grad(lambda floats: loss(*floats))(floats)
        floats = jax.tree.map(jnp.subtract, floats, slopes)
        return floats, (value, *(jnp.sum(x**2) for x in floats))

    try:
        for number in range(num_steps):
            floats, values = step(floats)
            print("STEP", number, *(float(x).hex() for x in values), flush=True)
            if num_steps == FOREVER:
                time.sleep(0.02)
                while jax.process_index() == 1 and os.path.exists(flag):
                    time.sleep(1)
    except jax.errors.JaxRuntimeError as error:
        print("ERROR", error, flush=True)
        os._exit(3)  # The usual exit would wait for the other process.


# The tests.


def start(count, problem, num_steps=NUM_STEPS, flag="", stuck_seconds=LIMIT):
    command = ["-m", "tests.test_processes", problem, str(num_steps), str(flag)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "cwd": ROOT}
    return _processes.started(count, command, stuck_seconds=stuck_seconds, **pipes)


def read_until(process, start):
    """The rest of the first line that starts so."""
    while not (line := process.stdout.readline()).startswith(start):
        assert line, "the process ended"
    return line.removeprefix(start).strip()


@pytest.mark.parametrize(
    "problem", ["output layer", pytest.param("ring", marks=pytest.mark.slow)]
)
def test_two_processes_train_as_one_does(problem):
    """Bit for bit."""
    with start(1, problem) as (alone,), start(2, problem) as both:
        texts = [process.communicate(timeout=LIMIT)[0] for process in (alone, *both)]
    steps = [[x for x in text.splitlines() if x.startswith("STEP")] for text in texts]
    assert len(steps[0]) == NUM_STEPS, texts[0]
    assert len({step.partition(" 0x")[2] for step in steps[0]}) == NUM_STEPS
    for other, text in zip(steps[1:], texts[1:], strict=True):
        assert other == steps[0], text


EVENTS = {  # Seconds within which the other process ends, and words of its error.
    "killed": (2, "Gloo all-reduce failed"),
    "coordinator killed": (2, "Gloo all-reduce failed|another task died"),
    "frozen": (HEARTBEAT + 5, "stopped sending heartbeats"),
    "stuck": (STUCK + 2, f"Timed out waiting {STUCK}000ms"),
}


@pytest.mark.slow
@pytest.mark.parametrize("event", EVENTS)
def test_one_process_fails(event, tmp_path):
    """The other one ends with a clear error, and nothing of both is left."""
    flag = tmp_path / "stuck"
    begin = functools.partial(start, 2, "output layer", FOREVER, flag)
    with begin(STUCK if event == "stuck" else LIMIT) as processes:
        addresses = [read_until(process, "ADDRESS") for process in processes]
        for process in processes:
            read_until(process, "STEP 1")
        survivor, other = processes[::-1] if event == "coordinator killed" else processes
        since = time.monotonic()
        if event == "stuck":
            flag.touch()
        else:
            other.send_signal(signal.SIGSTOP if event == "frozen" else signal.SIGKILL)
        text, _ = survivor.communicate(timeout=LIMIT)
        seconds = time.monotonic() - since
    most, words = EVENTS[event]
    assert survivor.returncode != 0
    assert any(word in text for word in words.split("|")), text
    assert seconds < most
    assert_gone(processes, addresses[0])


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def assert_gone(processes, address):
    """No process is left, and their port is free."""
    assert not any(is_alive(process.pid) for process in processes)
    host, port = address.split(":")
    assert host == "127.0.0.1"
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind((host, int(port)))


def test_processes_end_with_the_block_that_started_them():
    command = ["-c", "import time; print('STARTED', flush=True); time.sleep(60)"]
    block = _processes.started(2, command, stdout=subprocess.PIPE)
    processes = block.__enter__()
    for process in processes:
        read_until(process, "STARTED")
    processes[1].send_signal(signal.SIGSTOP)
    assert not block.__exit__(RuntimeError, RuntimeError("in the block"), None)
    assert not any(is_alive(process.pid) for process in processes)


PARENT = """
import time
from tests.test_processes import FOREVER, read_until, start

with start(2, "output layer", FOREVER) as processes:
    for process in processes:
        read_until(process, "STEP 1")
    print("STARTED", *(process.pid for process in processes), flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_processes_end_with_the_process_that_started_them():
    """Even if it is killed, which leaves it no time to end them."""
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        pids = list(map(int, read_until(parent, "STARTED").split()))
        parent.kill()
    end = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.1)


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), sys.argv[3])
