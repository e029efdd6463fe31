"""Our conversation templates as the Jinja that the transformers library renders.

    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]}]
    mistral_instruct:  [INST] <image>\\nWho? [/INST]

BOS is not part of it: the tokenizer puts it there.
"""

from avg_llava_jax.data.conversation import LLAMA_3_SYSTEM, PLACEHOLDER, VICUNA_SYSTEM

# What a turn says: its parts in order, an image on a line of its own; stripped where an image stands, as in `_checked`.
_SAID = """\
{%- macro parts(message) -%}
{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}
{%- for part in message['content'] -%}{{ 'IMAGE\\n' if part['type'] == 'image' else part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro said(message) -%}
{%- set text = parts(message) -%}
{{ (text | trim if 'IMAGE' in text else text) | replace('IMAGE', 'GAP') }}
{%- endmacro -%}
"""

_TURNS = {
    "vicuna_v1": """\
{{ 'SYSTEM ' }}
{%- for message in messages -%}
{{ 'USER: ' + said(message) + ' ASSISTANT:' if message['role'] == 'user' else ' ' + said(message) + eos_token }}
{%- endfor -%}""".replace("SYSTEM", VICUNA_SYSTEM.replace("'", "\\'")),
    "mistral_instruct": """\
{%- for message in messages -%}
{{ '[INST] ' + said(message) + ' [/INST]' if message['role'] == 'user' else ' ' + said(message) + eos_token }}
{%- endfor -%}""",
    "llama_3": """\
{{ '<|start_header_id|>system<|end_header_id|>\\n\\nSYSTEM<|eot_id|>' }}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + said(message) | trim + '<|eot_id|>' }}
{%- endfor -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if messages[-1]['role'] == 'user' }}""".replace(
        "SYSTEM", LLAMA_3_SYSTEM
    ),
}


def chat_template(template: str, after_image: str) -> str | None:
    """The Jinja of one of our templates; None for one whose turns are not chat, or that is the tokenizer's own.

    after_image: what is written behind an image, so that the text after it becomes the tokens that it becomes here.
    """
    turns = _TURNS.get(template.removeprefix("llava_"))
    return turns and (_SAID + turns).replace("GAP", PLACEHOLDER + after_image).replace("IMAGE", PLACEHOLDER)
