"""`avg-llava quickstart` in a checkout that is not installed: python -m launch.quickstart --flag=value ..."""

from avg_llava_jax.commands.quickstart import command

if __name__ == "__main__":
    command()
