"""`avg-llava import` in a checkout that is not installed: python -m launch.import_torch --flag=value ..."""

from avg_llava_jax.commands.import_torch import command

if __name__ == "__main__":
    command()
