"""`avg-llava feedback` in a checkout that is not installed: python -m launch.feedback --flag=value ..."""

from avg_llava_jax.commands.feedback import command

if __name__ == "__main__":
    command()
