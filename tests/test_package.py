"""The wheel: what it installs, and its command in a folder that is no checkout."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from avg_llava_jax.commands.main import COMMANDS, summary
from tests import benchmark_fixtures as fixtures

ROOT = Path(__file__).parents[1]
LOADED = """
import sys
from avg_llava_jax.commands.main import main
try:
    main(sys.argv[1:])
finally:
    print(sorted({"jax", "torch", "transformers"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves its own files where it builds."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("avg_llava_jax", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "configs").symlink_to("avg_llava_jax/configs")
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", output, source)
    (file,) = output.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--target", folder, wheel)
    return folder


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def run(installed, tmp_path):
    """Runs the installed package in an empty folder: (exit code, standard output, standard error)."""

    def run(*command):
        env = os.environ | {"PYTHONPATH": str(installed)}
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
        )
        return done.returncode, done.stdout, done.stderr

    run.program = installed / "bin" / "avg-llava"
    return run


def test_the_wheel_has_one_package_and_one_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        text = archive.read(entry_points).decode()
    assert {name.split("/")[0] for name in names} == {"avg_llava_jax", Path(entry_points).parent.name}
    parser = configparser.ConfigParser()
    parser.read_string(text)
    assert dict(parser["console_scripts"]) == {"avg-llava": "avg_llava_jax.commands.main:main"}
    assert sorted(parser) == ["DEFAULT", "console_scripts", "lmms_eval.models"]
    (plugin,) = parser["lmms_eval.models"].values()
    assert plugin.partition(":")[0].replace(".", "/") + ".py" in names
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "avg_llava_jax").rglob("*") if path.is_file()}
    assert {name for name in there if "__pycache__" not in name} == {
        name for name in names if name.startswith("avg_llava_jax/")
    }


def test_help_lists_the_commands(run):
    code, out, error = run(run.program, "--help")
    assert (code, error) == (0, "")
    listed = [line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  ")]
    assert listed == [[command, summary(command)] for command in COMMANDS]
    assert all(line.endswith(".") and 20 < len(line) < 90 for _, line in listed)


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "give a command; avg-llava --help lists them"),
        (["trian"], "there is no command 'trian'; did you mean 'train'? avg-llava --help lists them"),
        (["xyz"], "there is no command 'xyz'; avg-llava --help lists them"),
        (["answer"], "--prompt is missing; --help lists all flags"),
        (["answer", "--workdir=w"], "Unknown command line flag 'workdir'"),
        (["train", "--config=own.py", "--workdir=w"], "flag --config=own.py: own.py does not exist; the package has"),
        (["train", "--config=configs/jersey.py:x", "--workdir=w"], "flag --config=configs/jersey.py:x: "),
        (["train", "--config=configs/jersey.py:tiny", "--workdir=w", "--config.x=1"], "the config has no setting 'x'"),
        (["answer", "--prompt=a", "--checkpoint=nowhere"], "checkpoint folder nowhere does not exist"),
    ],
)
def test_what_is_wrong_is_one_line(run, given, message):
    code, out, error = run(run.program, *given)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"error: {message}")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_its_flags_and_loads_no_device_library(run, command):
    code, out, error = run("-c", LOADED, command, "--help")
    assert (code, error) == (0, "[]\n")
    assert out.startswith(summary(command)) and f"avg-llava {command}" in out
    assert f"\navg-llava {command}:\n" in out and "\n  --[no]traceback: " in out
    assert ("\n  --config: " in out) == (command in ("train", "feedback", "plan"))


def test_score_loads_no_device_library(run, tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"index": 0, "answer": "yes"}\n')
    data = fixtures.write_hub(tmp_path / "data", "pope")
    flags = ["--task=pope", "--answers=answers.jsonl", "--output=score.json"]
    code, out, error = run("-c", LOADED, "score", *flags, f"--data={data}")
    assert (code, error) == (0, "[]\n") and "pope_f1_score" in out and (tmp_path / "score.json").is_file()
    code, _, error = run("-c", LOADED, "score", *flags, "--data=nowhere")
    assert code == 2 and error.endswith("[]\n") and "--data=nowhere: no such folder" in error


def test_the_shipped_model_answers(run, tmp_path):
    picture = Image.new("RGB", (192, 96), "green")
    ImageDraw.Draw(picture).rectangle((40, 20, 80, 90), "red")
    picture.save(tmp_path / "a.png")
    code, out, error = run(run.program, "answer", "--image=a.png", "--prompt=What is the weather?", "--granularity=16")
    assert code == 0, error
    assert "image 0: 16 tokens a tile" in out and " new tokens, " in out


def test_a_checkout_has_a_thin_file_for_each_command():
    """As `python -m launch.train`. `make_tokenizer` writes into the checkout, so it is no command of the package."""
    files = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "launch").glob("*.py")}
    assert files.keys() - {"__init__", "make_tokenizer"} == set(COMMANDS.values())
    for command, module in COMMANDS.items():
        call = f"python -m launch.{module} --flag=value ..."
        assert files[module].splitlines() == [
            f'"""`avg-llava {command}` in a checkout that is not installed: {call}"""',
            "",
            f"from avg_llava_jax.commands.{module} import command",
            "",
            'if __name__ == "__main__":',
            "    command()",
        ]
