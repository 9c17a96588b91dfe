"""The texts of single tokens."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from deploy.report.token_text import TokenText
from tests.fakes import save_tiny_tokenizer


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token for each byte, as GPT-2 writes bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_a_character_belongs_to_the_token_that_completes_it(byte_tokenizer):
    text = "a é 日\n"
    ids = byte_tokenizer.encode(text).ids
    assert len(ids) == len(text.encode())
    pieces = TokenText(byte_tokenizer).pieces(ids)
    assert pieces == ["a", " ", "", "é", " ", "", "", "日", "\n"]


def test_a_response_that_ends_inside_a_character_keeps_its_tokens(byte_tokenizer):
    ids = byte_tokenizer.encode("a日").ids[:-1]
    assert TokenText(byte_tokenizer).pieces(ids) == ["a", "", ""]


def test_a_token_that_the_tokenizer_lacks_has_no_text(byte_tokenizer):
    ids = [*byte_tokenizer.encode("ab").ids, 5000]
    assert TokenText(byte_tokenizer).pieces(ids)[:2] == ["a", "b"]
    assert len(TokenText(byte_tokenizer).pieces(ids)) == 3


def test_an_older_run_uses_the_tokenizer_of_its_policy_or_model(tmp_path):
    run, model = tmp_path / "run", tmp_path / "model"
    run.mkdir()
    assert not TokenText.of_run(run, "embedded:other").found
    save_tiny_tokenizer(model)
    assert TokenText.of_run(run, str(model)).pieces([4, 1]) == ["a0", " <end>"]
    save_tiny_tokenizer(run / "policy")
    assert TokenText.of_run(run, "no/such/model").pieces([4, 1]) == ["a0", " <end>"]


def test_the_run_keeps_the_tokenizer_of_its_policy(tmp_path):
    from deploy.policy_files import PolicyFiles
    from tests.fakes import save_tiny_model

    policy = PolicyFiles.load(str(save_tiny_model(tmp_path / "model")))
    policy.keep_tokenizer(tmp_path)
    text = TokenText.of_run(tmp_path, "none")
    assert text.pieces([3, 4, 40]) == ["ask", " a0", " b6"]
