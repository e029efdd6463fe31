"""`avg-llava score` in a checkout that is not installed: python -m launch.score --flag=value ..."""

from avg_llava_jax.commands.score import command

if __name__ == "__main__":
    command()
