"""`avg-llava tradeoff` in a checkout that is not installed: python -m launch.tradeoff --flag=value ..."""

from avg_llava_jax.commands.tradeoff import command

if __name__ == "__main__":
    command()
