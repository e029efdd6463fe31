"""BadSample, the error for a sample that cannot be used, and the check for text that is not valid Unicode."""

from __future__ import annotations


class BadSample(ValueError):
    """A sample that is skipped and counted; one bad sample never stops a run.

    reason: short and machine-readable, the key under which samples are counted
        (`missing_image`, `empty_answer`, ...).
    detail: one line for a person that names the file, turn or number at fault.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        # Exceptions pickle by `args`, which holds the joined text; worker processes need both fields.
        return type(self), (self.reason, self.detail)


def half_character(text: str) -> str | None:
    """The first lone surrogate of a text as `\\ud83d`, None if it has none.

    JSON can encode one, and Python decodes arguments and file names that are not UTF-8 to them. Neither a tokenizer nor
    a file accepts such a text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None
