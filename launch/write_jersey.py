"""`avg-llava write-jersey` in a checkout that is not installed: python -m launch.write_jersey --flag=value ..."""

from avg_llava_jax.commands.write_jersey import command

if __name__ == "__main__":
    command()
