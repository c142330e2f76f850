"""Chat templates and small real tokenizers for the tests of masks: TRL's real templates, and our
own formats.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TRL_TEMPLATES_DIR = Path(trl.__file__).parent / "chat_templates"

MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}
    {%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}"""

# As in later Mistral templates: the system text opens the last user turn, wherever it was.
MISTRAL_SYSTEM_LAST = """\
{{- bos_token }}
{%- set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}
{%- set turns = messages[1:] if system else messages %}
{%- set last = namespace(user=-1) %}
{%- for turn in turns %}\
{%- if turn['role'] == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}\
{%- endfor %}
{%- for turn in turns %}
    {%- if turn['role'] == 'user' %}
        {{- '[INST] ' + (system if loop.index0 == last.user else '') \
+ turn['content'] + '[/INST]' }}
    {%- else %}{{- ' ' + turn['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""

HUMAN_ASSISTANT = """\
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{- 'Human: ' + message['content'] + '\\n\\n' }}
    {%- elif message['role'] == 'assistant' %}\
{{- 'Assistant: ' + message['content'] + eos_token + '\\n\\n' }}
    {%- else %}{{- message['content'] + '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"""

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

LLAMA_2 = """\
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}
{%- for turn in (messages[1:] if system else messages) %}
    {%- set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system else '' %}
    {%- if turn['role'] == 'user' %}\
{{- bos_token + '[INST] ' + text + turn['content'] | trim + ' [/INST]' }}
    {%- else %}{{- ' ' + turn['content'] | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""

OUR_TEMPLATES = {
    "ours: ChatML": CHATML,
    "ours: Human/Assistant text": HUMAN_ASSISTANT,
    "ours: Human/Assistant, no end": HUMAN_ASSISTANT.replace(" + eos_token", ""),
    "ours: Llama 2": LLAMA_2,
    "ours: Mistral [INST]": MISTRAL,
    "ours: Mistral, system last": MISTRAL_SYSTEM_LAST,
}

# The control tokens of all families together: for a mask it matters only that they are special.
SPECIAL_TOKENS = [
    "<s>", "</s>", "<bos>", "<eos>", "<|begin_of_text|>",
    "<|endoftext|>", "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>",
    "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>",
    "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
    "<｜User｜>", "<｜Assistant｜>",
    "<turn|>", "<|turn>", "<|channel>", "<channel|>", "[gMASK]",
    "<sop>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>",
    "<|call|>", "<|startoftext|>", "<end_of_utterance>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|eot|>", "<|eom|>",
]  # fmt: skip

# Tokens around calls only; all but the last are ends in the families' generation configs.
CALL_TOKENS = ["<|tool_response>", "<|observation|>", "<|assistant_end|>"]
CALL_STOPS = frozenset({"<|tool_response>", "<|observation|>", "<|user|>"})
LOOK_UP = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "The word."}},
            "required": ["word"],
        },
    },
}


def call_look_up(**arguments: Any) -> dict[str, Any]:
    """A call of the tool `LOOK_UP`."""
    function = {"name": "look_up", "arguments": arguments}
    return {"type": "function", "id": "call00001", "function": function}


def trl_template(name: str) -> str:
    """The text of one of TRL's templates."""
    return (TRL_TEMPLATES_DIR / f"{name}.jinja").read_text(encoding="utf-8")


def trl_template_names() -> list[str]:
    return sorted(path.stem for path in TRL_TEMPLATES_DIR.glob("*.jinja"))


@cache
def _trained_bpe(kind: str) -> str:
    """A BPE as JSON, trained on the words of the templates, so headers, spaces and newlines merge
    with the text.
    """
    texts = [re.sub(r"[^\w\s:,.<>]", " ", template) for template in OUR_TEMPLATES.values()]
    texts += [
        "Assistant: Hello world\n\nHuman: the quick brown fox\n\n  user model assistant 你好 é ü\n"
        for _ in range(20)
    ]
    if kind == "bytes":
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=700, initial_alphabet=alphabet, show_progress=False
        )
    else:
        alphabet = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def build_tokenizer(
    kind: str = "bytes",
    chat_template: str | None = None,
    *,
    special: list[str] | None = None,
    rstrip: bool = False,
) -> Any:
    """A fast tokenizer: kind `bytes` is byte-level BPE, `pieces` is like SentencePiece, with byte
    fallback.

    `rstrip` lets every control token swallow the whitespace to its right, as Phi-3's do.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_bpe(kind)), bos_token="<s>", eos_token="</s>"
    )
    names = SPECIAL_TOKENS if special is None else special
    tokens = [AddedToken(name, special=True, normalized=False, rstrip=rstrip) for name in names]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = chat_template
    return tokenizer
