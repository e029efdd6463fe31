"""`avg-llava train` in a checkout that is not installed: python -m launch.train --flag=value ..."""

from avg_llava_jax.commands.train import command

if __name__ == "__main__":
    command()
