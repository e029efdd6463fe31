"""Train the tokenizer that the project ships: python -m launch.make_tokenizer

Its words are those of `jersey` and of some plain English; any other text becomes bytes.
"""

import re
from collections.abc import Iterator

from absl import app, flags

from avg_llava_jax.data.jersey import Jersey
from avg_llava_jax.data.tokenizer import train_byte_bpe

FOLDER = flags.DEFINE_string("folder", "avg_llava_jax/assets/tokenizer", "Where the tokenizer goes.")
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 600, "Tokens in all: bytes, words, and the template's markers.")

RECORDS = 3000
ENGLISH = """
What is in this picture? Describe the image in a few words. How many people are there? Where is the dog?
There are two cats on the table. The man on the left is wearing a hat. A woman is riding a bicycle along the street.
Is there a car in the photo? Yes, there is. No, there is not. What time does the clock show? It is ten past four.
Read the text on the sign. The sign says open. Which of these is larger? The one at the top. What is written here?
A small house with a large garden and a tree in front of it. The water is blue and the sun is low over the hills.
Answer the question with a single word. What kind of food is on the plate? Who is holding the ball? Nobody.
"""


def texts() -> Iterator[str]:
    """Questions and answers as they stand in the template: after a space, or at the start of a line."""
    source = Jersey(turns=8)
    for index in range(RECORDS):
        for turn in source[index]["conversations"]:
            yield f" {turn['value']}".replace(" <image>\n", "")
    yield from re.findall(r"\S[^\n]*", ENGLISH)


def main(_: list[str]) -> None:
    tokenizer = train_byte_bpe(texts(), VOCAB_SIZE.value, FOLDER.value, markers=("[INST]", "[/INST]"))
    print(f"{FOLDER.value}: {tokenizer.vocab_size} tokens")


if __name__ == "__main__":
    app.run(main)
