"""Our conversation templates as the Jinja that the transformers library renders.

    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]}]
    mistral_instruct:  [INST] <image>\\nWho? [/INST]

None of them has a turn for what the system or the developer says. As in our server it stands before the first question:

    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    mistral_instruct:  [INST] Be brief.\\n\\nWho? [/INST]

Other turns (tool), tools, parts that are neither text nor image, and turns that do not alternate are errors. BOS is not
part of a template: the tokenizer puts it there.
"""

from avg_llava_jax.data.conversation import LLAMA_3_SYSTEM, PLACEHOLDER, VICUNA_SYSTEM

# What a turn says: its parts in order, an image on a line of its own; stripped where an image stands, as in `_checked`.
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
{{ raise_exception("template NAME wants turns of user and assistant that alternate, the first from the user") }}
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


def chat_template(template: str, after_image: str) -> str | None:
    """The Jinja of one of our templates; None for one whose turns are not chat, or that is the tokenizer's own.

    after_image: what is written behind an image, so that the text after it becomes the tokens that it becomes here.
    """
    name = template.removeprefix("llava_")
    if name not in _TURNS:
        return None
    said = _SAID.replace("NAME", name).replace("GAP", PLACEHOLDER + after_image).replace("IMAGE", PLACEHOLDER)
    return said + _TURNS[name]
