"""Reward models on disk: scores against transformers' own, the stored scale, hashes and refusals."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from common.data.dialogues import dialogue_ids
from common.errors import UserError
from common.model import reward_scores
from common.model.files import load_policy, load_tokenizer
from common.model.packing import ROW_MULTIPLE
from common.model.reward_head import (
    ScoreScale,
    check_trainable,
    content_hash,
    is_reward_model,
    load_reward_model,
    read_scale,
    reward_model_size,
    save_reward_model,
    write_scale,
)
from common.model.reward_scores import head_scores, sequence_scores
from common.model.size import model_size
from tests.fakes import END, WORDS, save_tiny_model

CPU = {"dtype": torch.float32, "device": torch.device("cpu")}
PAD, UNK = WORDS.index("<pad>"), WORDS.index("<unk>")
TEXTS = [("ask a1", "b1 b2 b3"), ("ask", "b4"), ("a3 a4 a5 a6 a7", "b5 <end> b6"), ("a8 <end>", "b7"), ("ask a1", "b1")]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def saved(policy, tmp_path_factory):
    """A reward model with a random head."""
    return save_with_random_head(policy, tmp_path_factory.mktemp("reward") / "model")


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def save_with_random_head(policy, target, scale=None):
    model = load_reward_model(policy, **CPU)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    save_reward_model(model, policy, target, scale or ScoreScale())
    return target


def padded(rows, *, multiple_of=1):
    """Right-padded ids, with garbage in the padding, and lengths."""
    width = -(-max(map(len, rows)) // multiple_of) * multiple_of
    input_ids = torch.randint(64, (len(rows), width), generator=torch.Generator().manual_seed(0))
    for row, ids in zip(input_ids, rows):
        row[: len(ids)] = torch.tensor(ids)
    return input_ids, torch.tensor([len(ids) for ids in rows])


# Scores


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({"pad_token": "<pad>", "unk_token": "<unk>"}, PAD),
        ({"pad_token": "<end>", "unk_token": "<unk>"}, UNK),  # the unknown token pads instead
        ({"pad_token": "<end>"}, END),
        ({}, END),
    ],
)
@torch.no_grad()
def test_scores_are_those_of_transformers_on_a_padded_batch(tmp_path, special, pad):
    base = save_tiny_model(tmp_path / "base")
    words = load_tokenizer(base).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", **special).save_pretrained(base)
    saved = save_with_random_head(base, tmp_path / "reward")

    tokenizer = AutoTokenizer.from_pretrained(saved)
    model = AutoModelForSequenceClassification.from_pretrained(saved, dtype=torch.float32)
    assert tokenizer.pad_token_id == model.config.pad_token_id == pad
    batch = tokenizer([f"{prompt} {response} <end>" for prompt, response in TEXTS], padding=True, return_tensors="pt")
    expected = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    assert expected.std() > 0.1  # otherwise the comparison would say nothing

    ours = load_reward_model(saved, **CPU)
    rows = [dialogue_ids(tokenizer, prompt, response, chat=False, pad_id=pad) for prompt, response in TEXTS]
    scores = sequence_scores(ours, *padded(rows))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        sequence_scores(ours, *padded(rows, multiple_of=ROW_MULTIPLE)), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_bits_of_a_score_do_not_depend_on_the_batch(saved, dtype):
    """On one thread, as a reward process runs by default."""
    model = load_reward_model(saved, dtype=dtype, device=torch.device("cpu"))
    rng = np.random.default_rng(0)
    rows = [rng.integers(64, size=rng.integers(1, 60)).tolist() for _ in range(24)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        together = sequence_scores(model, *padded(rows, multiple_of=ROW_MULTIPLE))
        for size in (1, 2, 5, 7, 13):
            groups = [padded(rows[i : i + size], multiple_of=ROW_MULTIPLE) for i in range(0, 24, size)]
            assert torch.equal(torch.cat([sequence_scores(model, *group) for group in groups]), together), size
    finally:
        torch.set_num_threads(threads)
    assert len(set(together.tolist())) > 20


@torch.no_grad()
def test_the_head_always_computes_in_float32(saved):
    model = load_reward_model(saved, dtype=torch.bfloat16, device=torch.device("cpu"))
    states = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected = [sum(s * w for s, w in zip(state, model.score.weight[0].tolist())) for state in states.tolist()]
    with torch.autocast("cpu", torch.bfloat16):
        scores = head_scores(model, states)
    assert (scores.dtype, scores.shape) == (torch.float32, (5,))
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)


# Loading


@torch.no_grad()
def test_a_language_model_gets_a_head_of_zeros(policy):
    model = load_reward_model(policy, **CPU)
    assert sequence_scores(model, torch.tensor([[3, 4, 5], [3, 6, 1]]), torch.tensor([3, 2])).tolist() == [0.0, 0.0]
    body = load_policy(policy, **CPU).base_model.state_dict()
    assert all(torch.equal(weight, body[name]) for name, weight in model.base_model.state_dict().items())
    assert model.config.pad_token_id == PAD


def test_a_reward_model_is_loaded_in_eval_mode_with_its_head_in_float32(saved):
    model = load_reward_model(saved, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert (model.base_model.dtype, model.score.weight.dtype, model.training) == (torch.bfloat16, torch.float32, False)
    assert model.score.weight.std() > 0.5  # its own head


def change_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_classifier_into_several_labels_is_refused(copied):
    change_config(copied, id2label={str(i): str(i) for i in range(3)})
    for refused in (check_trainable, reward_model_size, lambda directory: load_reward_model(directory, **CPU)):
        with pytest.raises(
            UserError, match="a llama model, cannot be a reward model: it classifies into 3 labels; a re"
        ):
            refused(copied)


def test_a_head_that_is_not_one_linear_layer_is_refused(tmp_path):
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(**small, vocab_size=64, num_labels=1)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be a reward model: its head is not one linear layer named `score`"):
        load_reward_model(tmp_path, **CPU)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ('{"model_type": "vit"}', "cannot be a reward model: Unrecognized configuration class"),
        ('{"model_type": "no_such_type"}', "cannot be a reward model: .* model type `no_such_type`"),
        ("{}", "cannot be a reward model: .* `model_type` key in its config.json"),
        ("{", "cannot be a reward model: .* not a valid JSON file"),
        (None, "cannot be a reward model: .* `model_type` key in its config.json"),
    ],
)
def test_a_directory_without_a_model_that_can_score_is_refused(tmp_path, config, complaint):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    for refused in (check_trainable, lambda directory: load_reward_model(directory, **CPU)):
        with pytest.raises(UserError, match=complaint):
            refused(tmp_path)


def test_only_a_reward_model_has_a_reward_models_size(policy, saved, tmp_path):
    assert reward_model_size(saved) == model_size(policy)
    one_label = shutil.copytree(policy, tmp_path / "copy")
    change_config(one_label, id2label={"0": "score"})
    assert is_reward_model(saved)
    for language_model in (policy, one_label):
        check_trainable(language_model)  # it can become one
        assert not is_reward_model(language_model)
        with pytest.raises(UserError, match=r"is not a reward model: .* is LlamaForCausalLM; train one with"):
            reward_model_size(language_model)


# Saving


@torch.no_grad()
def test_transformers_loads_a_saved_model_in_bf16(policy, tmp_path):
    trained = load_reward_model(policy, **CPU)
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    save_reward_model(trained, policy, tmp_path / "model", ScoreScale(chat=True, mean=1.0, deviation=2.0))
    assert trained.dtype == torch.float32  # training continues in float32

    loaded, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(loading.values())  # no missing and no surplus weight
    assert (loaded.dtype, loaded.config.num_labels) == (torch.bfloat16, 1)
    assert {weight.dtype for weight in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.bfloat16}
    expected = {name: weight.bfloat16() for name, weight in trained.state_dict().items()}
    assert expected.keys() == loaded.state_dict().keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("ask a1")["input_ids"] == [3, 5]


def contents(directory):
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    return {name: json.loads(data) if name == "config.json" else data for name, data in files.items()}


def test_saving_replaces_the_model_saved_before(saved, tmp_path):
    save_reward_model(load_reward_model(saved, **CPU), saved, tmp_path / "m", ScoreScale(chat=True, mean=7.0))
    (tmp_path / "m" / "leftover.json").touch()
    save_reward_model(load_reward_model(tmp_path / "m", **CPU), saved, tmp_path / "m", ScoreScale())
    assert read_scale(tmp_path / "m") == ScoreScale()
    assert contents(tmp_path / "m") == contents(saved)  # every weight, setting and token is kept


@pytest.mark.parametrize("scale", [ScoreScale(), ScoreScale(True, 0.1, 1 / 3), ScoreScale(False, -1e-30, 1e30)])
def test_writing_a_scale_changes_nothing_else(copied, scale):
    before = json.loads((copied / "config.json").read_text())
    names = sorted(path.name for path in copied.iterdir())
    write_scale(copied, ScoreScale(True, 5.0, 6.0))
    write_scale(copied, scale)
    assert read_scale(copied) == scale
    after = json.loads((copied / "config.json").read_text())
    assert {**after, "ratchet": None} == {**before, "ratchet": None}
    assert sorted(path.name for path in copied.iterdir()) == names
    load_reward_model(copied, **CPU)


def test_a_model_from_elsewhere_keeps_its_scores(policy):
    assert read_scale(policy) == ScoreScale(chat=None, mean=0.0, deviation=1.0)


# Content hashes


def test_a_hash_does_not_depend_on_place_or_time(saved, copied):
    known = content_hash(saved)
    assert len(known) == 16
    assert int(known, 16) >= 0
    for path in copied.iterdir():
        os.utime(path, (0, 0))
    write_scale(copied, ScoreScale())  # the same bytes written again
    assert content_hash(copied) == known


def test_a_hash_changes_with_a_weight_a_setting_a_token_or_the_scale(saved, copied):
    hashes = [content_hash(saved)]

    def changed():
        hashes.append(content_hash(copied))
        assert len(set(hashes)) == len(hashes)

    weights = load_file(copied / "model.safetensors")
    weights["score.weight"][0, 3] += 0.5
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    changed()
    for scale in (ScoreScale(mean=1e-9), ScoreScale(deviation=1.5), ScoreScale(chat=True)):
        write_scale(copied, scale)
        changed()
    change_config(copied, rms_norm_eps=1e-5)
    changed()
    vocabulary = (copied / "tokenizer.json").read_text()
    (copied / "tokenizer.json").write_text(vocabulary.replace('"a7"', '"a77"'))
    changed()
    (copied / "chat_template.jinja").write_text("{{ messages }}")
    changed()
    (copied / "chat_template.jinja").rename(copied / "other_template.jinja")
    changed()


def test_a_head_missing_in_the_files_is_refused(copied):
    model = load_reward_model(copied, **CPU)
    model.save_pretrained(copied, state_dict={k: v for k, v in model.state_dict().items() if k != "score.weight"})
    change_config(copied, architectures=["LlamaForSequenceClassification"])
    for refused in (reward_model_size, lambda directory: load_reward_model(directory, **CPU)):
        with pytest.raises(UserError, match=r"score.weight is not in its files; complete the download"):
            refused(copied)


@pytest.mark.parametrize(
    "scale",
    [[], {"men": 1.0}, {"mean": "x"}, {"deviation": 0}, {"deviation": -1.0}, {"mean": float("inf")}, {"chat": "yes"}],
    ids=str,
)
def test_a_malformed_scale_is_refused(copied, scale):
    change_config(copied, ratchet=scale)
    for refused in (reward_model_size, read_scale):
        with pytest.raises(UserError, match=r"`ratchet` in its config.json must"):
            refused(copied)


def test_a_model_whose_scores_depend_on_the_batch_is_refused(saved, monkeypatch):
    plain = reward_scores.sequence_scores

    def coloured(model, input_ids, lengths):
        return plain(model, input_ids, lengths) + 0.1 * input_ids.float().mean() / 64

    monkeypatch.setattr(reward_scores, "sequence_scores", coloured)
    with pytest.raises(UserError, match="a sequence's score depends on the padding or the other sequences"):
        load_reward_model(saved, **CPU)


def test_the_check_leaves_a_new_head_at_zero(policy):
    assert not load_reward_model(policy, **CPU).score.weight.any()


def test_a_replacement_with_wrong_results_is_refused(saved):
    def install(model):
        forward = model.base_model.norm.forward
        model.base_model.norm.forward = lambda x: 1.01 * forward(x)

    with pytest.raises(UserError, match=r"is off by 0\.0"):
        load_reward_model(saved, **CPU, install=install)
