"""`avg-llava explain` in a checkout that is not installed: python -m launch.explain --flag=value ..."""

from avg_llava_jax.commands.explain import command

if __name__ == "__main__":
    command()
