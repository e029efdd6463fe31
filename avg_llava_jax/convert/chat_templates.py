"""Jinja chat templates, for the transformers library, that render as the server does, by `data.conversation`.

    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]}]
    mistral:  [INST] <image>\\nWho? [/INST]

Text of the roles system and developer is ChatML's system turn; in the others it precedes the first question:

    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    mistral:  [INST] Be brief.\\n\\nWho? [/INST]
    chatml:   <|im_start|>system\\nBe brief.<|im_end|>\\n<|im_start|>user\\nWho?<|im_end|>\\n ...

As in the server: parts stand on lines of their own, images first unless they stand between texts; messages of one role
in a row are one turn; blank ones are empty; an empty question precedes an answer that comes first, except in ChatML,
and follows one that comes last where `add_generation_prompt` asks for another answer.

Other roles (tool), tools, and parts that are neither text nor image raise an error. BOS is not part of a template: the
tokenizer adds it.
"""

from avg_llava_jax.data.conversation import CHATML, LLAMA_3_SYSTEM, PLACEHOLDER, VICUNA_SYSTEM
from avg_llava_jax.data.tokenizer import Tokenizer

# Text of a message: a blank one is empty.
_PARTS = """\
{%- macro parts(message) -%}
{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}
{%- set seen = namespace(all=[], texts=[], images=[], behind=false, between=false) -%}
{%- for part in message['content'] or [] -%}
{%- if part['type'] == 'image' -%}
{%- set seen.all = seen.all + ['IMAGE'] -%}
{%- set seen.images = seen.images + ['IMAGE'] -%}
{%- set seen.behind = seen.texts | length > 0 -%}
{%- elif part['type'] == 'text' -%}
{%- set seen.all = seen.all + [part['text']] -%}
{%- set seen.texts = seen.texts + [part['text']] -%}
{%- set seen.between = seen.between or seen.behind -%}
{%- else -%}{{ raise_exception("template NAME has no parts of type '" ~ part['type'] ~ "', only text and image") }}
{%- endif -%}
{%- endfor -%}
{%- set lines = seen.all if seen.between else seen.images + seen.texts -%}
{{ lines | join('\\n') + ('\\n' if lines and (seen.all[-1] == 'IMAGE' if seen.between else not seen.texts) else '') }}
{%- endif -%}
{%- endmacro -%}
{%- macro said(message) -%}
{%- set text = parts(message) -%}
{{ text if text | trim else '' }}
{%- endmacro -%}
"""

# `heard.system`: what the system says. `turns`: what the others say, messages with texts as their contents.
_TURNS_OF = """\
{%- set heard = namespace(system=[], turns=[], checked=[]) -%}
{%- for message in messages -%}
{%- set text = said(message) -%}
{%- if message['role'] in ('system', 'developer') -%}
{%- if text -%}{%- set heard.system = heard.system + [text] -%}{%- endif -%}
UNKNOWN
{%- elif heard.turns and heard.turns[-1]['role'] == message['role'] and not heard.turns[-1]['tool_calls'] -%}
{%- set text = [heard.turns[-1]['content'], text] | select | join('\\n') -%}
{%- set heard.turns = heard.turns[:-1] + [dict(heard.turns[-1], content=text)] -%}
{%- else -%}{%- set heard.turns = heard.turns + [dict(message, content=text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set heard.system = heard.system | join('\\n') -%}
{%- set asked = [{'role': 'user', 'content': ''}] -%}
{%- set last = (heard.turns or [{'role': 'assistant'}])[-1] -%}
{%- if not heard.turns or (add_generation_prompt and last['role'] == 'assistant' and not last['tool_calls']) -%}
{%- set heard.turns = heard.turns + asked -%}
{%- endif -%}
GREETING
{%- for turn in heard.turns -%}
{%- set text = turn['content'] -%}
{%- set text = text | trim if 'IMAGE' in (text or '') else text -%}
{%- set heard.checked = heard.checked + [dict(turn, content=BEFORE)] -%}
{%- endfor -%}
{%- set turns = heard.checked -%}
"""
_GREETING = """\
{%- if heard.turns[0]['role'] == 'assistant' and WHERE -%}
{%- set heard.turns = asked + heard.turns -%}
{%- endif -%}"""
_BEFORE = "(heard.system + '\\n\\n' if heard.system and loop.first else '') + text"

_ERRORS = """\
{%- elif message['role'] not in ('user', 'assistant') -%}
{{ raise_exception("template NAME has no turns of role '" ~ message['role'] ~ "'") }}
{%- elif message['tool_calls'] -%}{{ raise_exception("template NAME has no tool calls") }}"""
_NO_TOOLS = """{%- if tools -%}{{ raise_exception("template NAME has no tools") }}{%- endif -%}"""


def _turns_of(unknown: str, greets: bool, system_turn: bool) -> str:
    """Jinja that makes `turns` of the messages. unknown: the branch of other messages than those of two roles.

    greets: whether the template takes an answer before all questions. system_turn: whether it takes a system turn.
    """
    question_first = ("" if system_turn else _GREETING.replace("WHERE", "heard.system")) if greets else _GREETING
    return (
        (_PARTS + _TURNS_OF)
        .replace("UNKNOWN\n", unknown)
        .replace("GREETING\n", question_first.replace("WHERE", "true"))
        .replace("BEFORE", "text" if system_turn else _BEFORE)
        .replace("IMAGE", PLACEHOLDER)
    )


_TURNS = {
    "vicuna_v1": """\
{{ 'SYSTEM ' }}
{%- for turn in turns -%}
{{ 'USER: ' + turn['content'] + ' ASSISTANT:' if turn['role'] == 'user' else ANSWER }}
{%- endfor -%}""".replace("SYSTEM", VICUNA_SYSTEM.replace("'", "\\'")),
    "mistral": """\
{%- for turn in turns -%}
{{ '[INST] ' + turn['content'] + ' [/INST]' if turn['role'] == 'user' else ANSWER }}
{%- endfor -%}""",
    "llama_3": """\
{{ '<|start_header_id|>system<|end_header_id|>\\n\\nSYSTEM<|eot_id|>' }}
{%- for turn in turns -%}
{{ '<|start_header_id|>' + turn['role'] + '<|end_header_id|>\\n\\n' + turn['content'] | trim + '<|eot_id|>' }}
{%- endfor -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if turns[-1]['role'] == 'user' }}""".replace(
        "SYSTEM", LLAMA_3_SYSTEM
    ),
}
_SPACE = "(' ' if turn['content'] else '')"
_ANSWER = f"{_SPACE} + turn['content'] + eos_token"

_CHATML = """\
{%- set system = heard.system or 'SYSTEM' -%}
{{ '<|im_start|>systemUSER\\n' + system + '<|im_end|>END' if system }}
{%- for each in turns -%}
{%- set turn = namespace(text=each['content'], images='') -%}
{%- if each['role'] == 'user' -%}FIRST{{ '<|im_start|>userUSER' + turn.images }}
{%- else -%}{{ '<|im_start|>assistant' }}{%- endif -%}
{{ '\\n' + turn.text + '<|im_end|>END' }}
{%- endfor -%}
{{ '<|im_start|>assistant\\n' if turns[-1]['role'] == 'user' }}"""

# Images that begin a question, taken out of its text.
_IMAGES_FIRST = """\
{%- for _ in range(turn.text.count('<image>')) -%}
{%- if turn.text.startswith('<image>') -%}
{%- set turn.images = turn.images + '<image>' -%}
{%- set turn.text = turn.text[7:] -%}
{%- if turn.text.startswith('\\n') -%}{%- set turn.text = turn.text[1:] -%}{%- endif -%}
{%- endif -%}
{%- endfor -%}"""

_TURNS["mistral_instruct"] = _TURNS["mistral"].replace("ANSWER", _ANSWER.replace("eos", f"{_SPACE} + eos"))
for _name in ("vicuna_v1", "mistral"):
    _TURNS[_name] = _TURNS[_name].replace("ANSWER", _ANSWER)
for _name, _form in CHATML.items():
    _TURNS[_name] = (
        _CHATML.replace("FIRST", _IMAGES_FIRST if _form.user else "")
        .replace("SYSTEM", _form.system or "")
        .replace("USER", _form.user)
        .replace("END", _form.end.replace("\n", "\\n"))
    )


def chat_template(template: str, after_image: str) -> str | None:
    """Jinja of a conversation template; None for `plain`, which is not a chat, and `tokenizer`, the tokenizer's own.

    after_image: text written after an image, so that the library tokenizes the text behind it as `conversation` does.
    """
    name = "llama_3" if template == "llava_llama_3" else template
    if name not in _TURNS:
        return None
    chatml = name in CHATML
    text = (_NO_TOOLS + _turns_of(_ERRORS, chatml, chatml)).replace("NAME", name) + _TURNS[name]
    spaced = f"{{{{ whole | replace('{PLACEHOLDER}', '{PLACEHOLDER}{after_image}') }}}}"
    return f"{{%- set whole -%}}{text}{{%- endset -%}}{spaced}" if after_image else text


# In front of a tokenizer's own template: the turns as its messages. Those with tools stay as they are, parts as texts.
_ANY = """\
{%- elif message['role'] not in ('user', 'assistant') or message['tool_calls'] -%}
{%- set heard.turns = heard.turns + [dict(message, content=text) if message['content'] else message] -%}
"""
_OWN = """\
{%- set turns = ([{'role': 'system', 'content': heard.system}] if heard.system else []) + turns -%}
"""
_MESSAGES = """\
{%- set heard.turns = [] -%}
{%- for turn in turns -%}
{%- set text = turn['content'] | replace('IMAGE', 'IMAGEGAP') if turn['content'] is string else turn['content'] -%}
{%- set heard.turns = heard.turns + [dict(turn, content=CONTENT)] -%}
{%- endfor -%}
{%- set messages = heard.turns -%}
"""


def with_images(tokenizer: Tokenizer, after_image: str) -> str:
    """A tokenizer's own chat template, which takes texts, made to take parts as well, images among them.

    By itself it would print a list of parts as Python does: `[{'type': 'image'}, ...`.
    """
    turns = _turns_of(_ANY, tokenizer.takes_greeting, tokenizer.takes_system).replace("NAME", "tokenizer")
    messages = _MESSAGES.replace("IMAGE", PLACEHOLDER).replace("GAP", after_image)
    messages = messages.replace("CONTENT", "[{'type': 'text', 'text': text}]" if tokenizer.takes_parts else "text")
    return turns + (_OWN if tokenizer.takes_system else "") + messages + tokenizer.chat_template
