"""What a sample that cannot be used is reported as."""

from __future__ import annotations


class BadSample(ValueError):
    """A sample that is skipped and counted, never one that stops a run by itself.

    reason: short and machine-readable, the key under which samples are counted
        (`missing_image`, `empty_answer`, ...).
    detail: one line for a person, with the file, turn or number at fault.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        # Exceptions pickle by `args`, which holds the joined text; worker processes need both fields.
        return type(self), (self.reason, self.detail)
