"""`avg-llava answer` in a checkout that is not installed: python -m launch.answer --flag=value ..."""

from avg_llava_jax.commands.answer import command

if __name__ == "__main__":
    command()
