"""Flags of commands that several processes run together, on one machine or many."""

from absl import flags

COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "auto (on SLURM, Cloud TPU, GKE TPU, Open MPI), or HOST:PORT of process 0; default: one process."
)
PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes, with --coordinator=HOST:PORT.")
PROCESS = flags.DEFINE_integer("process", None, "Index of this process, from 0.")
HEARTBEAT = flags.DEFINE_integer("heartbeat", 60, "Seconds of silence after which a process counts as lost.", 5)


def join() -> None:
    """Join the other processes. Must come before any use of a device."""
    from avg_llava_jax.parallel import hosts

    hosts.start(COORDINATOR.value, PROCESSES.value, PROCESS.value, HEARTBEAT.value)
