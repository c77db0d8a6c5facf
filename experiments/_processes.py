"""Several processes of one command that compute together, on this machine or on several.

`started` starts them here, on the loopback address. On several machines, start the command on
each, with the variables `JAX_COORDINATOR_ADDRESS` (host:port of the first machine),
`JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` (from 0) in its environment.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jax

__all__ = ["connect", "is_one_of_several", "run_together", "started"]


def is_one_of_several() -> bool:
    """Whether this process was started to compute together with others."""
    return "JAX_PROCESS_ID" in os.environ


def connect(num_devices: int, *, heartbeat_seconds: int = 10) -> None:
    """Makes so many devices, and joins the processes that the environment names.

    It must come before anything that is computed. Where a CPU is the only device of a machine,
    it stands in for as many as are asked for. A process that is not heard for the given time
    counts as dead, which ends the others.
    """
    num_processes = int(os.environ.get("JAX_NUM_PROCESSES", 1))
    with suppress(RuntimeError):  # Something was computed, so that the devices are there.
        jax.config.update("jax_num_cpu_devices", num_devices // num_processes)
    if not is_one_of_several():
        return
    if parent := os.environ.get("PARENT_PROCESS_ID"):
        threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    # The preemption service would swallow SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    address = os.environ["JAX_COORDINATOR_ADDRESS"]
    jax.distributed.initialize(
        address,
        num_processes,
        int(os.environ["JAX_PROCESS_ID"]),
        coordinator_bind_address=address,  # By default, it would listen on all addresses.
        initialization_timeout=60,
        heartbeat_timeout_seconds=heartbeat_seconds,
    )


def _end_with(parent: int) -> None:
    """Ends this process once its parent is gone, even if that was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@contextmanager
def started(
    count: int, command: Sequence[str], *, stuck_seconds: int = 300, **popen: Any
) -> Iterator[list["subprocess.Popen[str]"]]:
    """The processes, which `connect` to each other; at the end all are killed.

    Args:
        count: number of processes.
        command: arguments of this Python.
        stuck_seconds: for how long a process waits for one that is alive but does not come.
            XLA's default is half an hour.
        **popen: options of `subprocess.Popen`.
    """
    with socket.socket() as free:  # Its port is free again before it is used.
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "PARENT_PROCESS_ID": str(os.getpid()),
        "XLA_FLAGS": f"{flags} --xla_cpu_collective_timeout_seconds={stuck_seconds}",
    }
    processes: list[subprocess.Popen[str]] = []
    try:
        for number in range(count):
            env = environment | {"JAX_PROCESS_ID": str(number)}
            arguments = [sys.executable, *command]
            options: dict[str, Any] = {"env": env, "text": True, "start_new_session": True}
            processes.append(subprocess.Popen(arguments, **options, **popen))
        yield processes
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)  # It ends a process that is stopped, too.
        for process in processes:
            process.communicate()


def run_together(count: int, command: Sequence[str]) -> int:
    """Runs the processes until all are done or one fails; returns the exit code."""
    with started(count, command) as processes:
        codes = [process.poll() for process in processes]
        while None in codes and not any(codes):
            time.sleep(0.1)
            codes = [process.poll() for process in processes]
    for number, code in enumerate(codes):
        if code:
            print(f"Process {number} of {count} ended with code {code}.", file=sys.stderr)
    return int(any(codes))
