"""`avg-llava benchmark` in a checkout that is not installed: python -m launch.benchmark --flag=value ..."""

from avg_llava_jax.commands.benchmark import command

if __name__ == "__main__":
    command()
