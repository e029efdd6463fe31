"""`avg-llava calibrate` in a checkout that is not installed: python -m launch.calibrate --flag=value ..."""

from avg_llava_jax.commands.calibrate import command

if __name__ == "__main__":
    command()
