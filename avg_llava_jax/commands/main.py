"""The program `avg-llava`: `avg-llava COMMAND --flag=value ...` runs one command, `avg-llava --help` lists them.

Only the module of the requested command is imported, since every command defines its own flags.
"""

import ast
import difflib
import importlib
import pathlib
import sys
from collections.abc import Sequence

PROGRAM = "avg-llava"

COMMANDS = {
    "quickstart": "quickstart",
    "answer": "answer",
    "explain": "explain",
    "serve": "serve",
    "train": "train",
    "feedback": "feedback",
    "merge": "merge",
    "publish": "publish",
    "plan": "plan",
    "evaluate": "evaluate",
    "tradeoff": "tradeoff",
    "calibrate": "calibrate",
    "benchmark": "benchmark",
    "score": "score",
    "import": "import_torch",
    "export": "export_torch",
    "write-jersey": "write_jersey",
}
"""The module of each command, in the order of the help."""


def summary(command: str) -> str:
    """The first line of a command's docstring, read without importing the module."""
    text = pathlib.Path(__file__).with_name(f"{COMMANDS[command]}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def usage() -> str:
    """The help of `avg-llava`: the commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {command:<{width}}  {summary(command)}" for command in COMMANDS]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [--flag=value ...]",
            "",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help lists the flags of a command.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name; default: the arguments of this process."""
    given = list(sys.argv[1:] if argv is None else argv)
    name, flags = "".join(given[:1]), given[1:]
    if name in ("--help", "-h", "-help"):
        print(usage())
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        wrong = f"there is no command {name!r}" if name else "give a command"
        hint = f"did you mean {near[0]!r}? " if near else ""
        print(f"error: {wrong}; {hint}{PROGRAM} --help lists them", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"{PROGRAM} {name}", *flags]  # the program's name in --help and in errors of absl
    importlib.import_module(f"avg_llava_jax.commands.{COMMANDS[name]}").command()


if __name__ == "__main__":
    main()
