"""Jinja chat templates, for the transformers library, that render as the templates of `data.conversation`.

    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]}]
    mistral_instruct:  [INST] <image>\\nWho? [/INST]

Text of the roles system and developer is ChatML's system turn; in the others it precedes the first question:

    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    mistral_instruct:  [INST] Be brief.\\n\\nWho? [/INST]
    chatml:            <|im_start|>system\\nBe brief.<|im_end|>\\n<|im_start|>user\\nWho?<|im_end|>\\n ...

Other roles (tool), tools, parts that are neither text nor image, and turns that do not alternate raise an error. BOS is
not part of a template: the tokenizer adds it.
"""

from avg_llava_jax.data.conversation import CHATML, LLAMA_3_SYSTEM, PLACEHOLDER, VICUNA_SYSTEM

# Text of a turn: its parts in order, each image on its own line; stripped if it has an image, as in `_checked`.
_SAID = """\
{%- macro parts(message) -%}
{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}
{%- for part in message['content'] or [] -%}
{%- if part['type'] == 'image' -%}{{ 'IMAGE\\n' }}
{%- elif part['type'] == 'text' -%}{{ part['text'] }}
{%- else -%}{{ raise_exception("template NAME has no parts of type '" ~ part['type'] ~ "', only text and image") }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro said(message, before) -%}
{%- set text = before + parts(message) -%}
{{ (text | trim if 'IMAGE' in text else text) | replace('IMAGE', 'GAP') }}
{%- endmacro -%}
{%- set heard = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] in ('system', 'developer') -%}{%- set heard.system = heard.system + parts(message) + '\\n' -%}
{%- elif message['role'] not in ('user', 'assistant') -%}
{{ raise_exception("template NAME has no turns of role '" ~ message['role'] ~ "'") }}
{%- endif -%}
{%- if message['tool_calls'] -%}{{ raise_exception("template NAME has no tool calls") }}{%- endif -%}
{%- endfor -%}
{%- if tools -%}{{ raise_exception("template NAME has no tools") }}{%- endif -%}
{%- set turns = messages | rejectattr('role', 'in', ['system', 'developer']) | list -%}
{%- for message in turns -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception("template NAME needs turns of user and assistant that alternate, the first from the user") }}
{%- endif -%}
{%- endfor -%}
{%- if heard.system -%}{%- set heard.system = heard.system + '\\n' -%}{%- endif -%}
"""

_TURNS = {
    "vicuna_v1": """\
{{ 'SYSTEM ' }}
{%- for message in turns -%}
{%- set text = said(message, heard.system if loop.first else '') -%}
{{ 'USER: ' + text + ' ASSISTANT:' if message['role'] == 'user' else ' ' + text + eos_token }}
{%- endfor -%}""".replace("SYSTEM", VICUNA_SYSTEM.replace("'", "\\'")),
    "mistral_instruct": """\
{%- for message in turns -%}
{%- set text = said(message, heard.system if loop.first else '') -%}
{{ '[INST] ' + text + ' [/INST]' if message['role'] == 'user' else ' ' + text + eos_token }}
{%- endfor -%}""",
    "llama_3": """\
{{ '<|start_header_id|>system<|end_header_id|>\\n\\nSYSTEM<|eot_id|>' }}
{%- for message in turns -%}
{%- set text = said(message, heard.system if loop.first else '') | trim -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + text + '<|eot_id|>' }}
{%- endfor -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if turns and turns[-1]['role'] == 'user' }}""".replace(
        "SYSTEM", LLAMA_3_SYSTEM
    ),
}

_CHATML = """\
{%- set system = heard.system[:-2] or 'SYSTEM' -%}
{{ '<|im_start|>systemUSER\\n' + system + '<|im_end|>END' if system }}
{%- for message in turns -%}
{%- set turn = namespace(text=said(message, ''), images='') -%}
{%- if message['role'] == 'user' -%}FIRST{{ '<|im_start|>userUSER' + turn.images }}
{%- else -%}{{ '<|im_start|>assistant' }}{%- endif -%}
{{ '\\n' + turn.text + '<|im_end|>END' }}
{%- endfor -%}
{{ '<|im_start|>assistant\\n' if turns and turns[-1]['role'] == 'user' }}"""

# Images that begin a question, taken out of its text.
_IMAGES_FIRST = """\
{%- for _ in range(turn.text.count('<image>')) -%}
{%- if turn.text.startswith('<image>') -%}
{%- set turn.images = turn.images + '<image>' -%}
{%- set turn.text = turn.text[7:] -%}
{%- if turn.text.startswith('\\n') -%}{%- set turn.text = turn.text[1:] -%}{%- endif -%}
{%- endif -%}
{%- endfor -%}"""

for _name, _form in CHATML.items():
    _TURNS[_name] = (
        _CHATML.replace("FIRST", _IMAGES_FIRST if _form.user else "")
        .replace("SYSTEM", _form.system or "")
        .replace("USER", _form.user)
        .replace("END", _form.end.replace("\n", "\\n"))
    )


# In front of a template that takes texts alone: what the messages say, parts and images, as texts.
_AS_TEXTS = (
    _SAID[: _SAID.index("{%- set heard")].replace("NAME", "tokenizer")
    + """\
{%- set heard = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string or message['content'] -%}
{%- set heard.messages = heard.messages + [dict(message, content=said(message, ''))] -%}
{%- else -%}{%- set heard.messages = heard.messages + [message] -%}{%- endif -%}
{%- endfor -%}
{%- set messages = heard.messages -%}
"""
)


def with_images(own: str, after_image: str) -> str:
    """A tokenizer's own chat template, which takes texts, made to take parts as well, images among them.

    By itself it would print a list of parts as Python does: `[{'type': 'image'}, ...`.
    """
    return _AS_TEXTS.replace("GAP", PLACEHOLDER + after_image).replace("IMAGE", PLACEHOLDER) + own


def chat_template(template: str, after_image: str) -> str | None:
    """Jinja of a conversation template; None for `plain`, which is not a chat, and `tokenizer`, the tokenizer's own.

    after_image: text written after an image, so that the library tokenizes the text behind it as `conversation` does.
    """
    name = "llama_3" if template == "llava_llama_3" else template
    if name not in _TURNS:
        return None
    said = _SAID.replace("NAME", name).replace("GAP", PLACEHOLDER + after_image).replace("IMAGE", PLACEHOLDER)
    return said + _TURNS[name]
