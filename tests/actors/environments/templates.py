"""Chat templates in the manner of well-known models, and tokenizers that have their special tokens."""

import copy
import string
from functools import cache

from tokenizers import Regex, pre_tokenizers
from transformers import LlamaTokenizer

from common.model.embedded import EMBEDDED
from common.model.files import load_tokenizer, resolve_model

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message.role + '
' + message.content + '<|im_end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
# The same text, but nothing follows the last message.
OPEN_ENDED = """{% for message in messages %}{{ '<|im_start|>' + message.role + '
' + message.content + '<|im_end|>' }}{% if not loop.last %}{{ '
' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '
<|im_start|>assistant
' }}{% endif %}"""
LLAMA_3 = """{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}
{{- '<|start_header_id|>' + ('ipython' if message.role == 'tool' else message.role) + '<|end_header_id|>\n\n' }}
{{- message.content | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if message.role not in ('user', 'assistant') or (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}
{%- else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"""
# Demands calls before the answers of tools. Leaves out the content next to calls.
MISTRAL_WITH_TOOLS = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'user' %}{{ '[INST] ' + message.content + '[/INST]' }}
{%- elif message.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' and messages[loop.index0 - 1].tool_calls is not defined %}
{{- raise_exception('a tool answers without a call') }}{% endif %}
{{- '[TOOL_RESULTS] ' + message.content + ' ' + message.tool_call_id + '[/TOOL_RESULTS]' }}
{%- elif message.tool_calls is defined %}{{ '[TOOL_CALLS] ' }}{% for call in message.tool_calls %}
{{- call.function | tojson + ' ' + call.id + (';' if not loop.last else '') }}{% endfor %}{{ eos_token }}
{%- else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"""
# A message with a call ends with a token of its own, and has one call at most.
LLAMA_3_WITH_TOOLS = """{{ bos_token }}{% for message in messages %}
{{- '<|start_header_id|>' + ('ipython' if message.role == 'tool' else message.role) + '<|end_header_id|>\n\n' }}
{%- if message.tool_calls is not defined %}{{ message.content | trim + '<|eot_id|>' }}
{%- elif message.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}
{%- else %}{{ message.tool_calls[0].function.arguments | tojson + '<|eom_id|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
# Calls have special tokens, and their arguments must be text. What an answer says depends on the call before it.
DEEPSEEK = """{% for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|start_header_id|>' + messages[loop.index0 - 1].tool_calls[0].function.name + '<|end_header_id|>' }}
{{- message.content + '<|eot_id|>' }}
{%- else %}{{ '<|im_start|>' + message.role + '\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<|start_header_id|>' + call.function.name + '\n' + call.function.arguments + '<|end_header_id|>' }}{% endfor %}
{{- '<|im_end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
ZEPHYR = """{% for message in messages %}{{ '<|' + message.role + '|>
' + message.content + eos_token + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% endif %}"""
GEMMA = """{{ bos_token }}{% for message in messages %}
{%- set role = 'model' if message.role == 'assistant' else 'user' %}
{{- '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
# No special token ends a message.
WORDS_ONLY = """{% for message in messages %}{{ message.role | capitalize + ': ' + message.content + '

' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
QWEN_3 = """{%- set ns = namespace(last_query=messages | length - 1, found=false) %}
{%- for message in messages[::-1] %}{% if not ns.found and message.role == 'user' %}
{%- set ns.found = true %}{% set ns.last_query = messages | length - 1 - loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
{%- set thought = '' %}{% if '</think>' in message.content %}
{%- set thought = message.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}{% endif %}
{%- if loop.index0 > ns.last_query and (loop.last or thought) %}
{{- '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + content }}
{%- else %}{{ '<|im_start|>assistant\n' + content }}{% endif %}{{ '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# The prompt ends with the beginning of a thought, which earlier answers lack.
THINKS_FIRST = CHATML.replace("assistant\n", "assistant\n<think>\n")
NUMBERED = """{% for message in messages %}{% if message.role == 'user' %}
{{- '[Round ' ~ loop.index0 ~ ']' }}{% endif %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
FORGETFUL = """{% for message in messages[-2:] %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

SPECIAL = [
    *("<s>", "</s>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
]


@cache
def _smollm2():
    """The shipped demo model's tokenizer: byte-level BPE, with ChatML's tokens."""
    tokenizer = load_tokenizer(resolve_model(EMBEDDED))
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    return tokenizer


@cache
def _pieces():
    """In the manner of Llama 2: a space before every text, and one token for each character."""
    letters = [*string.ascii_letters, *string.digits, *"?!.,'+-_\n"]
    pieces = ["<unk>", "<s>", "</s>", "▁", *letters]
    merges = [("▁", letter) for letter in "abcdefgh"]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *("".join(pair) for pair in merges)])}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    tokenizer.add_tokens(["[INST]", "[/INST]"], special_tokens=True)
    return tokenizer


# As Llama 3 splits texts. Unlike GPT-2, it keeps two line breaks together whatever follows them.
LLAMA_3_SPLITS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama_3(template=LLAMA_3):
    """Llama 3's special tokens and rule for splitting texts, with a template for them."""
    tokenizer = with_template(template, end="<|eot_id|>", bos="<|begin_of_text|>")
    split = pre_tokenizers.Split(LLAMA_3_SPLITS, "isolated")
    parts = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return tokenizer


def with_template(template, *, end="<|im_end|>", bos=None, pieces=False):
    """A tokenizer of its own with this template."""
    tokenizer = copy.deepcopy(_pieces() if pieces else _smollm2())
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.eos_token = end
    if bos is not None:
        tokenizer.bos_token = bos
    return tokenizer
