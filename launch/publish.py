"""`avg-llava publish` in a checkout that is not installed: python -m launch.publish --flag=value ..."""

from avg_llava_jax.commands.publish import command

if __name__ == "__main__":
    command()
