"""`avg-llava plan` in a checkout that is not installed: python -m launch.plan --flag=value ..."""

from avg_llava_jax.commands.plan import command

if __name__ == "__main__":
    command()
