"""Many processes as one run: how they find each other, agree, and end together.

Every process runs the same program, holds its devices' part of every array and reads its own rows of each
batch. Whatever one of them learns alone (a signal, a file that cannot be read) must be told to all before
anything is decided by it: processes that decide alone wait for each other forever.

Where a process is lost the others notice when they next wait for it, at once where its connections close,
otherwise after the `heartbeat` seconds that `start` was given; JAX then ends them too. The run is started
again as a whole, on as many processes as there are then, and goes on from its last checkpoint.

Where a process ends because what it was given is wrong, starting again mends nothing: it says so where the
others look every second (`leave`), and all of them end as it does.
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
"""Exit code of a process that has lost another one (EX_TEMPFAIL): started again, the run goes on."""

PATIENCE = 10.0
"""Seconds that a process which failed waits for the others to fail as well."""

LONGEST_WAIT = 30 * 24 * 3600 * 1000
"""Milliseconds; a process that is lost is noticed much earlier, by its heartbeat."""

FAILED = "avg_llava_jax/failed"
"""The key under which the coordinator keeps what the first process that failed said."""

_leaving = threading.Lock()  # taken for good by whoever ends this process


def start(coordinator: str, processes: int | None = None, process: int | None = None, heartbeat: int = 60) -> None:
    """Join the other processes of the run; before anything else touches a device.

    Args:
      coordinator: "" = there are no others; `auto` = SLURM, a Cloud TPU, GKE or Open MPI says who is who;
        HOST:PORT of process 0 otherwise.
      processes, process: how many there are and which one this is, where `coordinator` is an address.
      heartbeat: seconds after which a process that is silent counts as lost.

    Raises:
      ValueError: names the flag that is missing or makes no sense.
      ConnectionError: the others did not come.
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
        raise ConnectionError(f"the other processes did not come: {_first_line(error)}") from error
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(distributed.global_state.client, over), daemon=True)
    watch.start()
    atexit.register(lambda: (over.set(), watch.join()))  # not in the middle of a call when the interpreter ends


def _watch(client: Any, over: threading.Event) -> None:
    """End this process as soon as another one has said that it failed."""
    while not over.wait(1.0):
        if said := _said(client):
            leave(2, said)


def _said(client: Any) -> str:
    """What the first process that failed said, "" where none has, or the coordinator is gone."""
    try:
        return client.key_value_try_get(FAILED)
    except jax.errors.JaxRuntimeError:
        return ""


def leave(code: int, message: str) -> NoReturn:
    """Say why, and end with this exit code; the other processes end likewise, unless the code is `RESTART`.

    They end in order then, with the same message. Where a process was lost because it failed, what it said counts.
    """
    if not jax.distributed.is_initialized() and not _leaving.locked():  # locked: another thread ends it already
        print(f"error: {message}", file=sys.stderr)
        sys.exit(code)
    _leaving.acquire()
    client = distributed.global_state.client
    if said := _said(client):
        code, message = 2, said
    elif code != RESTART:
        where = f"process {jax.process_index()} of {jax.process_count()} failed"
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first, or the coordinator is gone
            client.key_value_set(FAILED, f"{where}: {message}")
    print(f"error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if code != RESTART:  # then there is nobody to wait for
        end = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        end.start()
        end.join(PATIENCE)
    os._exit(code)


def first() -> bool:
    """Whether this is the process that writes what only one may write: logs, config.json, plots."""
    return jax.process_index() == 0


def place() -> tuple[int, int]:
    """Which process this is, from 0, and how many there are."""
    return jax.process_index(), jax.process_count()


def wait(for_what: str) -> None:
    """Until every process is here, however long that takes. All must call it, each `for_what` once.

    Raises:
      ConnectionError: one of them is gone.
    """
    if jax.process_count() > 1:
        with together():
            distributed.global_state.client.wait_at_barrier(for_what, timeout_in_ms=LONGEST_WAIT)


def lost(error: BaseException) -> bool:
    """Whether an error comes from waiting for a process that is gone."""
    if jax.process_count() == 1:
        return False
    if isinstance(error, jax.errors.JaxRuntimeError):
        return "RESOURCE_EXHAUSTED" not in str(error)  # that is memory or disk
    return isinstance(error, ValueError) and "Gloo" in str(error)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around what the processes do together.

    Raises:
      ConnectionError: one of them is gone.
    """
    try:
        yield
    except Exception as error:
        if not lost(error):
            raise
        raise ConnectionError(
            f"process {jax.process_index()} of {jax.process_count()} has lost another one ({_first_line(error)}): "
            "start the run again on all hosts, it goes on from its last checkpoint"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]


class Votes:
    """Counts that every process puts in, added up by the devices on their way to a step.

    The sum is queued before the step: to read it waits only for the step before, which is waited for anyway.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._sum = jax.jit(lambda counts: counts.sum(axis=0), out_shardings=sharding.replicated(mesh))

    def cast(self, *counts: int) -> jax.Array:
        """Sums over all processes, int32 (number of counts,), the same everywhere. All must call it."""
        rows = np.zeros((len(self._mesh.local_devices), len(counts)), np.int32)
        rows[0] = counts  # for the process; its other devices add nothing
        shape = (self._mesh.size, len(counts))
        return self._sum(jax.make_array_from_process_local_data(self._each, rows, shape))


def gather(value: Any) -> list[Any]:
    """What every process has, JSON values in the order of the processes. All must call it, and wait for all."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.array(len(text))).max())
    room = 1 << (longest - 1).bit_length()  # few sizes, each of which is compiled once
    texts = multihost_utils.process_allgather(np.pad(text, (0, room - len(text)), constant_values=ord(" ")))
    return [json.loads(row.tobytes()) for row in texts]


def agree(fine: bool) -> bool:
    """Whether it is fine for every process. All must call it."""
    return all(gather(fine))
