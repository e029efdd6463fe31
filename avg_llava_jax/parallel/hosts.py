"""Many processes as one run: they find each other, agree, and end together.

Every process runs the same program, holds its devices' part of every array, and loads its own rows of each batch. What
one process learns alone (a signal, an unreadable file) must reach all of them before any acts on it: processes that
decide alone wait for each other forever.

A lost process is noticed when the others next wait for it: at once where its connections close, otherwise after the
`heartbeat` seconds of `start`; JAX then ends them too. The run is restarted as a whole, on any number of processes, and
resumes from its last checkpoint.

A process that fails because of its input would fail again after a restart: it publishes its message where the others
look every second (`leave`), and all of them exit with it.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # its client's keys and values have no public name yet
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avg_llava_jax.parallel import sharding

AUTO = "auto"
RESTART = 75
"""Exit code of a process that has lost another one (EX_TEMPFAIL): after a restart the run resumes."""

PATIENCE = 10.0
"""Seconds that a failed process waits for the others to exit."""

LONGEST_WAIT = 30 * 24 * 3600 * 1000
"""Milliseconds; a lost process is noticed much earlier, by its heartbeat."""

FAILED = "avg_llava_jax/failed"
"""The coordinator's key for the message of the first process that failed."""

_leaving = threading.Lock()  # acquired, and never released, by the thread that ends this process


def start(coordinator: str, processes: int | None = None, process: int | None = None, heartbeat: int = 60) -> None:
    """Join the other processes of the run; call it before JAX touches a device.

    Args:
      coordinator: "" = a run of one process; `auto` = SLURM, a Cloud TPU, GKE or Open MPI knows the processes;
        HOST:PORT of process 0 otherwise.
      processes, process: their number and the number of this one, where `coordinator` is an address.
      heartbeat: seconds of silence after which a process counts as lost.

    Raises:
      ValueError: a flag is missing or wrong; the message names it.
      ConnectionError: the other processes did not connect.
    """
    if coordinator in ("", AUTO):
        if processes is not None or process is not None:
            raise ValueError("--processes and --process go with --coordinator=HOST:PORT")
        if not coordinator:
            return
    elif not coordinator.rpartition(":")[0] or not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"--coordinator={coordinator}: give HOST:PORT of process 0, or {AUTO}")
    elif processes is None or process is None or not 0 <= process < processes:
        raise ValueError(f"--processes={processes} --process={process}: process counts from 0 to processes - 1")
    given = {} if coordinator == AUTO else {"coordinator_address": coordinator, "num_processes": processes}
    try:
        jax.distributed.initialize(
            **given,
            process_id=process,
            cluster_detection_method=None if coordinator == AUTO else "deactivate",
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=heartbeat,
        )
    except ValueError as error:
        raise ValueError(
            f"--coordinator={AUTO}: no SLURM step, Cloud TPU, GKE or Open MPI is known here ({error}); "
            "give --coordinator=HOST:PORT --processes=N --process=I"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        raise ConnectionError(f"the other processes did not connect: {_first_line(error)}") from error
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(distributed.global_state.client, over), daemon=True)
    watch.start()
    atexit.register(lambda: (over.set(), watch.join()))  # not in the middle of a call when the interpreter ends


def _watch(client: Any, over: threading.Event) -> None:
    """End this process as soon as another one publishes that it failed."""
    while not over.wait(1.0):
        if said := _said(client):
            leave(2, said)


def _said(client: Any) -> str:
    """The message of the first process that failed; "" if none has, or the coordinator is gone."""
    try:
        return client.key_value_try_get(FAILED)
    except jax.errors.JaxRuntimeError:
        return ""


def leave(code: int, message: str) -> NoReturn:
    """Print the message and exit with `code`; the other processes exit likewise, unless the code is `RESTART`.

    The first failed process's message wins: a process that has lost one that failed exits with that message.
    """
    if not jax.distributed.is_initialized() and not _leaving.locked():  # locked: another thread is ending this process
        print(f"error: {message}", file=sys.stderr)
        sys.exit(code)
    _leaving.acquire()
    client = distributed.global_state.client
    if said := _said(client):
        code, message = 2, said
    elif code != RESTART:
        where = f"process {jax.process_index()} of {jax.process_count()} failed"
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first, or the coordinator is gone
            client.key_value_set(FAILED, f"{where}: {message}")
    print(f"error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if code != RESTART:  # after a loss there is no process to wait for
        end = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        end.start()
        end.join(PATIENCE)
    os._exit(code)


def first() -> bool:
    """Whether this is process 0, which alone writes logs, config.json and plots."""
    return jax.process_index() == 0


def place() -> tuple[int, int]:
    """The number of this process, from 0, and the number of processes."""
    return jax.process_index(), jax.process_count()


def wait(for_what: str) -> None:
    """Wait until every process calls this, without a time limit. Each `for_what` can be used once.

    Raises:
      ConnectionError: a process is lost.
    """
    if jax.process_count() > 1:
        with together():
            distributed.global_state.client.wait_at_barrier(for_what, timeout_in_ms=LONGEST_WAIT)


def lost(error: BaseException) -> bool:
    """Whether an error comes from waiting for a lost process."""
    if jax.process_count() == 1:
        return False
    if isinstance(error, jax.errors.JaxRuntimeError):
        return "RESOURCE_EXHAUSTED" not in str(error)  # that one means memory or disk
    return isinstance(error, ValueError) and "Gloo" in str(error)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A context for operations of all processes together: an error of a lost process becomes one clear line.

    Raises:
      ConnectionError: a process is lost.
    """
    try:
        yield
    except Exception as error:
        if not lost(error):
            raise
        raise ConnectionError(
            f"process {jax.process_index()} of {jax.process_count()} has lost another one ({_first_line(error)}): "
            "start the run again on all hosts, it resumes from its last checkpoint"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]


class Votes:
    """Sums of counts over all processes, computed on the devices just before a training step.

    The sum is queued before the step, so reading it waits only for the step before, which the loop waits for anyway.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._sum = jax.jit(lambda counts: counts.sum(axis=0), out_shardings=sharding.replicated(mesh))

    def cast(self, *counts: int) -> jax.Array:
        """Sums over all processes, int32 (number of counts,), the same on each. All processes must call it."""
        rows = np.zeros((len(self._mesh.local_devices), len(counts)), np.int32)
        rows[0] = counts  # on the process's first device; the others add 0
        shape = (self._mesh.size, len(counts))
        return self._sum(jax.make_array_from_process_local_data(self._each, rows, shape))


def gather(value: Any) -> list[Any]:
    """Gather a JSON value of every process, in process order. All processes must call it, and wait for all."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.array(len(text))).max())
    room = 1 << (longest - 1).bit_length()  # powers of two: few sizes to compile
    texts = multihost_utils.process_allgather(np.pad(text, (0, room - len(text)), constant_values=ord(" ")))
    return [json.loads(row.tobytes()) for row in texts]


def agree(fine: bool) -> bool:
    """Whether `fine` is true on every process. All processes must call it."""
    return all(gather(fine))
