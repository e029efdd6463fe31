"""`avg-llava evaluate` in a checkout that is not installed: python -m launch.evaluate --flag=value ..."""

from avg_llava_jax.commands.evaluate import command

if __name__ == "__main__":
    command()
