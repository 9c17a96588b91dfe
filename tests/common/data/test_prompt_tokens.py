"""Tokens of texts to continue, for tokenizers that add tokens before a text, after it, or none."""

import signal
import string
import subprocess
import sys
import threading

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from common.config.actors import PromptsConfig
from common.data import prompt_tokens
from common.data.dialogues import dialogue_ids
from common.data.prompt_records import load_records
from common.data.prompt_tokens import bare_ids, rendered, text_ids
from common.errors import UserError

LETTERS = string.ascii_lowercase
PIECES = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, **{letter: 4 + i for i, letter in enumerate(LETTERS)}}


def t5():
    """Adds </s> after every text and has no BOS."""
    return T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in LETTERS)]
    )


def llama(*, bos, eos):
    tokenizer = LlamaTokenizer(vocab=PIECES, merges=[], add_eos_token=eos, add_bos_token=bos)
    parts = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos)
    special = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(parts, special_tokens=special)
    return tokenizer


def bert():
    """Adds [CLS] before a text and [SEP] after it; neither is named BOS or EOS."""
    words = Tokenizer(models.WordLevel({"[CLS]": 0, "[SEP]": 1, "hi": 2, "[UNK]": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def gpt2():
    """Uses one token for BOS, EOS and unknown words, and adds none."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return GPT2Tokenizer(vocab={"<|endoftext|>": 0, **{c: i for i, c in enumerate(letters, 1)}}, merges=[])


TOKENIZERS = {
    "t5": (t5, [], [1]),
    "llama": (lambda: llama(bos=True, eos=False), [1], []),
    "llama with add_eos_token": (lambda: llama(bos=True, eos=True), [1], [2]),
    "llama without bos": (lambda: llama(bos=False, eos=True), [], [2]),
    "bert": (bert, [0], [1]),
    "gpt2": (gpt2, [], []),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_added_before_a_text_stay_and_those_added_after_it_go(name):
    make, before, behind = TOKENIZERS[name]
    tokenizer = make()
    [bare] = bare_ids(tokenizer, ["hi"])
    assert tokenizer("hi")["input_ids"] == [*before, *bare, *behind]
    assert text_ids(tokenizer, "hi") == [*before, *bare]
    assert text_ids(tokenizer, "") == before


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_end_token_is_between_the_prompt_and_response_of_a_dialogue(name):
    make, before, _ = TOKENIZERS[name]
    tokenizer = make()
    [prompt], [response] = bare_ids(tokenizer, ["hi"]), bare_ids(tokenizer, ["hi hi"])
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    assert dialogue_ids(tokenizer, "hi", "hi hi", chat=False, pad_id=None) == [*before, *prompt, *response, *end]


def test_bos_in_the_text_of_a_prompt_or_a_template_is_not_doubled():
    tokenizer = llama(bos=True, eos=False)
    assert tokenizer("<s>hi")["input_ids"][:2] == [1, 1]
    assert text_ids(tokenizer, "<s>hi") == [1, *bare_ids(tokenizer, ["<s>hi"])[0][1:]]
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}{{ messages[1].content }}"
    ids = dialogue_ids(tokenizer, [{"role": "user", "content": "<s>a"}], "b", chat=True, pad_id=None)
    assert ids.count(1) == 1


# Chat templates that never end

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(prompt_tokens._TemplateClock, "TICK_S", 0.05)
    monkeypatch.setattr(prompt_tokens._TemplateClock, "LIMIT", 2)
    monkeypatch.setattr(prompt_tokens, "_clock", prompt_tokens._TemplateClock())


def test_an_endless_template_is_refused_with_its_reason(tmp_path, impatient):
    tokenizer = llama(bos=True, eos=False)
    tokenizer.chat_template = "{% if messages[0].content == 'on' %}" + ENDLESS + "{% endif %}hi"
    (tmp_path / "p.jsonl").write_text('{"prompt": "off"}\n{"prompt": "on"}\n')
    cfg = PromptsConfig(train=str(tmp_path / "p.jsonl"), format="chat")
    with pytest.raises(UserError) as caught:
        load_records(cfg.train, cfg, tokenizer, seed=0, max_tokens=9)
    message = "line 2: the tokenizer's chat template refuses the prompt: it did not end within 0.1 s of computing"
    assert message in str(caught.value)


def test_time_between_templates_does_not_count(impatient):
    tokenizer = llama(bos=True, eos=False)
    tokenizer.chat_template = "hi"
    before = signal.getsignal(signal.SIGVTALRM)
    for _ in range(4):
        assert rendered(tokenizer, [{"role": "user", "content": "a"}]) == "hi"
        compute(ticks=1)
    compute(ticks=1)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    assert signal.getsignal(signal.SIGVTALRM) == before


def compute(ticks):
    """Computes until the timer has fired `ticks` times, or has stopped."""
    fired, handler = [], signal.getsignal(signal.SIGVTALRM)

    def counted(number, frame):
        fired.append(number)
        if callable(handler):
            handler(number, frame)

    if signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0):
        return
    signal.signal(signal.SIGVTALRM, counted)
    while len(fired) < ticks:
        pass


def test_templates_are_rendered_in_other_threads_too():
    tokenizer = llama(bos=True, eos=False)
    tokenizer.chat_template = "hi"
    found = []
    thread = threading.Thread(target=lambda: found.append(rendered(tokenizer, [{"role": "user", "content": "a"}])))
    thread.start()
    thread.join()
    assert found == ["hi"]


PROGRAM = """
import atexit, signal
atexit.register(lambda: print(signal.getitimer(signal.ITIMER_VIRTUAL)[0]))  # runs after handlers registered later
from common.data.prompt_tokens import rendered

class Tokenizer:
    def apply_chat_template(self, messages, **options):
        print(signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 0)
        return "text"

rendered(Tokenizer(), [])
"""


def test_no_timer_is_left_when_python_ends():
    """Python resets signals to their defaults while it ends, and the default of this one kills the process."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert ended.returncode not in (-signal.SIGVTALRM, 128 + signal.SIGVTALRM)
    assert (ended.stdout.split(), ended.stderr) == (["True", "0.0"], "")
