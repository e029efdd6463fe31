"""Write `jersey`, a synthetic data set of team photos, as LLaVA JSON and PNG files.

avg-llava write-jersey --output=DIR --source="jersey?split=test&paired=true" --count=300
"""

from absl import flags

from avg_llava_jax.commands import cli
from avg_llava_jax.data import jersey
from avg_llava_jax.data.sources import open_source

OUTPUT = flags.DEFINE_string("output", None, "The folder to write: SPLIT.json and images/.")
SOURCE = flags.DEFINE_string("source", "jersey?split=test&paired=true", "The records, in the form of data.path.")
COUNT = flags.DEFINE_integer("count", 300, "Number of records.", lower_bound=1)


def main() -> None:
    source = open_source(SOURCE.value)
    if not isinstance(source, jersey.Jersey):
        raise ValueError(f"--source={SOURCE.value} is not jersey: give `jersey?field=value&...`")
    print(jersey.write(source, COUNT.value, OUTPUT.value))


def command() -> None:
    cli.run(main, required=["output"], model_flags=())
