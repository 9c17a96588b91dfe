"""Tokens of a prompt, from a text or chat messages: at most one BOS, and no end token. Runs anywhere."""

from __future__ import annotations

import atexit
import signal
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.config.actors import TextFormat
from common.data.json_values import shown
from common.data.messages import Message
from common.errors import UserError


class _TemplateClock:
    """Stops a chat template that computes for longer than LIMIT ticks. Without it, two nested loops in a template could
    prevent a run from starting. It works only in a process's main thread, which reads prompts and pairs. In other
    threads the time limits of calls apply.

    The timer keeps running between templates. Starting it for each template would cost a system call.
    """

    TICK_S = 1.0  # of this process's CPU time
    LIMIT = 10  # usual templates take less than a millisecond

    def __init__(self) -> None:
        self._ticks = 0
        self._rendering = self._runs = False
        self._before: Any = None

    def start(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._ticks, self._rendering = 0, True
        if not self._runs:
            self._runs = True
            atexit.register(
                signal.setitimer, signal.ITIMER_VIRTUAL, 0
            )  # a tick after Python has shut down would kill the process
            self._before = signal.signal(signal.SIGVTALRM, self._tick)
            signal.setitimer(signal.ITIMER_VIRTUAL, self.TICK_S, self.TICK_S)

    def stop(self) -> None:
        self._rendering = False

    def _tick(self, number: int, frame: Any) -> None:
        self._ticks += 1
        if not self._rendering:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, self._before or signal.SIG_DFL)
            self._runs = False
        elif self._ticks > self.LIMIT:
            raise TimeoutError(f"it did not end within {self.LIMIT * self.TICK_S:g} s of computing")


_clock = _TemplateClock()


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> str:
    """The text that the tokenizer's chat template makes of the messages. Raises any error of the template."""
    _clock.start()
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    finally:
        _clock.stop()


def rendered_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a chat template's text. The template writes its own special tokens."""
    return with_beginning(tokenizer, text, bare_ids(tokenizer, [text])[0], chat=True)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a plain text: with the tokens that the tokenizer adds before it, without those it adds after it."""
    return with_beginning(tokenizer, text, bare_ids(tokenizer, [text])[0], chat=False)


def bare_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, with nothing added. A batch takes half the time of one text after another."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def with_beginning(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], *, chat: bool) -> list[int]:
    """Adds the tokens that begin a sequence to bare ids, unless a chat template has written them into the text. Two BOS
    become one."""
    return _one_bos(tokenizer, text, ids if chat else [*_added_before(tokenizer), *ids])


def without_end_token(
    where: str, tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], cfg: TextFormat
) -> tuple[str, list[int]]:
    """A prompt's text and tokens. If they end with the end token, the setting `last_end_token` decides what happens to
    it: UserError, removal, or no change."""
    end = tokenizer.eos_token_id
    # A single token may be BOS: some tokenizers use one token for BOS and end.
    if end is None or len(ids) < 2 or ids[-1] != end or cfg.last_end_token == "keep":
        return text, ids
    if cfg.last_end_token == "refuse":
        origin = "chat template" if cfg.format == "chat" else "text"
        raise UserError(
            f"{where}: the {origin} ends the prompt with the end token {shown(tokenizer.eos_token)}, but the policy "
            f'must continue it; remove the token from the {origin}, or set {cfg.section}.last_end_token = "remove" '
            '("keep" if the model was trained this way)'
        )
    while len(ids) > 1 and ids[-1] == end:
        ids, text = ids[:-1], text.rstrip().removesuffix(tokenizer.eos_token)
    return text, ids


def check_embedded(where: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, vocabulary: int | None) -> None:
    """Raises UserError for a token id that the embedding of `vocabulary` rows lacks. None: its size is not known."""
    if vocabulary is not None and (largest := max(ids)) >= vocabulary:
        raise UserError(
            f"{where}: it has {shown(tokenizer.convert_ids_to_tokens(largest))}, token {largest}, but the model's "
            f"embedding has {vocabulary} rows: the tokenizer is not the model's. Use the model's own, or resize its "
            "embedding"
        )


def _one_bos(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> list[int]:
    """The ids with one BOS at most. Only BOS tokens that the text spells out are removed, because some tokenizers use
    one token for BOS and for unknown words."""
    if len(ids) < 2 or ids[0] != ids[1]:  # a quick test that decides almost every text
        return ids
    bos = tokenizer.bos_token_id
    if bos is None or ids[0] != bos or not text.lstrip().startswith(tokenizer.bos_token):
        return ids
    return ids[next((i for i, token in enumerate(ids) if token != bos), len(ids)) - 1 :]


@lru_cache(maxsize=16)  # keyed by identity, because nothing changes a tokenizer in use
def _added_before(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that the tokenizer's post-processor adds before every text."""
    for probe in ("a", "0", ".", *sorted(tokenizer.get_vocab())[:100]):
        bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
        whole = tokenizer(probe)["input_ids"]
        for start in range(len(whole) - len(bare) + 1):
            if bare and whole[start : start + len(bare)] == bare:
                return tuple(whole[:start])
    return ()
