"""Advice where the disk is full."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from avg_llava_jax import checkpoint

FULL = ("No space left on device", "Disk quota exceeded")
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@contextlib.contextmanager
def watched(workdir: Path) -> Iterator[None]:
    """Wrap a run so that an error from a full disk says how much to free.

    Raises:
      OSError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        raise OSError(_advice(workdir)) from error


def _is_full(error: BaseException | None) -> bool:
    """Whether the disk is full: TensorStore raises a ValueError with the system's text, others chain an OSError."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(text in str(error) for text in FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def _advice(workdir: Path) -> str:
    usage, saved = shutil.disk_usage(workdir), checkpoint.steps(workdir)
    text = f"the disk of {workdir} is full: {_size(usage.free)} of {_size(usage.total)} are free"
    if saved:
        needed = _bytes(workdir / checkpoint.STEPS / str(saved[-1]))
        text += f", a checkpoint takes {_size(needed)}; free {_size(max(needed - usage.free, 0))} or more there"
    else:
        text += "; free some there, or use another --workdir"
    spare = [folder for folder in (workdir / checkpoint.STEPS).glob("*.damaged") if folder.is_dir()]
    if spare:
        text += f" ({', '.join(f'{folder}: {_size(_bytes(folder))}' for folder in spare)} can go)"
    return text + (f", then the same command resumes from step {saved[-1]}" if saved else "")


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _size(count: int) -> str:
    """`1.5 GiB`."""
    power = min(max(count.bit_length() - 1, 0) // 10, len(UNITS) - 1)
    return f"{count / 1024**power:.4g} {UNITS[power]}"
