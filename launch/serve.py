"""`avg-llava serve` in a checkout that is not installed: python -m launch.serve --flag=value ..."""

from avg_llava_jax.commands.serve import command

if __name__ == "__main__":
    command()
