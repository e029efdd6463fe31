"""`avg-llava merge` in a checkout that is not installed: python -m launch.merge --flag=value ..."""

from avg_llava_jax.commands.merge import command

if __name__ == "__main__":
    command()
