"""`avg-llava export` in a checkout that is not installed: python -m launch.export_torch --flag=value ..."""

from avg_llava_jax.commands.export_torch import command

if __name__ == "__main__":
    command()
