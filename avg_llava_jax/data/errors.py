"""What a sample that cannot be used is reported as, and texts that are none."""

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


def half_character(text: str) -> str | None:
    """The first lone surrogate of a text as `\\ud83d`, None where it has none.

    JSON can spell one, and Python makes them of arguments and file names that are no UTF-8; no tokenizer and no file
    takes a text that has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None
