"""Models on disk: refusals, sizes, loading, and saving in place of an older one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from common.errors import UserError
from common.files import replaced_directory
from common.model.embedded import EMBEDDED
from common.model.files import end_token_ids, load_policy, load_tokenizer, resolve_model, save_policy
from common.model.lengths import Lengths
from common.model.packing import ROW_MULTIPLE
from common.model.size import ModelSize, model_size, parameter_shapes
from tests.fakes import END, save_tiny_model

CPU = {"dtype": torch.float32, "device": torch.device("cpu")}


def refusal(name) -> str:
    with pytest.raises(UserError) as caught:
        resolve_model(str(name))
    return str(caught.value)


# Finding a model


def test_a_complete_directory_is_used_directly(tmp_path):
    assert resolve_model(str(save_tiny_model(tmp_path))) == tmp_path


def test_a_directory_without_config_or_weights_is_refused(tmp_path):
    assert f"model.path ({tmp_path}) has no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert f"model.path ({tmp_path}) has no weights (*.safetensors)" in refusal(tmp_path)


def test_a_plan_needs_the_config_of_a_model_and_no_weights(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path), weights=False) == tmp_path
    asked = []

    def download(name, *, allow_patterns):
        asked.extend(allow_patterns)
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("org/model", weights=False) == tmp_path
    assert "config.json" in asked
    assert not any("safetensors" in pattern for pattern in asked)


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "./no/model", "/no/model", "~/no-model", "embedded:other"])
def test_a_name_that_is_no_directory_and_no_hub_name_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(name)
    assert f"model.path ({name}) is neither a directory nor a hub name" in message
    assert EMBEDDED in message


def test_a_failed_download_is_refused_with_its_cause(monkeypatch):
    def no_network(name, **options):
        raise ConnectionError(name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    assert "model.path (org/model) is not a directory, and downloading it failed: ConnectionError" in refusal(
        "org/model"
    )


@pytest.mark.ray
def test_the_embedded_model_is_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("RATCHET_CACHE", str(tmp_path))
    directory = resolve_model(EMBEDDED)
    assert directory.parent == tmp_path
    times = {file: file.stat().st_mtime_ns for file in directory.iterdir()}
    assert resolve_model(EMBEDDED) == directory
    assert {file: file.stat().st_mtime_ns for file in directory.iterdir()} == times

    tokenizer, policy = load_tokenizer(directory), load_policy(directory, **CPU)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert tokenizer.decode([int(policy(ids, lengths=Lengths([ids.shape[1]])).logits[0, -1].argmax())]) == " Paris"


# Sizes and shapes


def test_sizes_are_those_counted_by_hand(tmp_path):
    # Embedding 64 * 64 = 4096. A layer: queries and output 2 * 64 * 64, keys and values 2 * 64 * 32, three matrices
    # 64 * 128, two norms of 64: 8192 + 4096 + 24,576 + 128 = 36,992. A last norm of 64: 4096 + 2 * 36,992 + 64.
    expected = ModelSize(
        parameters=78_144,
        layers=2,
        hidden=64,
        heads=2,
        kv_heads=1,
        head_dim=32,
        vocabulary=64,
        context=128,
        intermediate=128,
    )
    assert model_size(save_tiny_model(tmp_path / "tied")) == expected
    # A separate output embedding: 4096 more.
    assert model_size(save_tiny_model(tmp_path / "untied", tied=False)).parameters == 82_240


def test_two_embeddings_that_the_config_calls_one_are_refused(tmp_path):
    directory = save_tiny_model(tmp_path / "model", tied=False)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(UserError, match=r"its config says they are one \(tie_word_embeddings\); set that to false"):
        load_policy(directory, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("tied", [True, False])
def test_published_shapes_are_those_in_the_files(tmp_path, tied):
    directory = save_tiny_model(tmp_path / "model", tied=tied)
    held = load_file(directory / "model.safetensors")
    assert ("lm_head.weight" in held) is not tied
    assert parameter_shapes(directory) == {name: tuple(tensor.shape) for name, tensor in held.items()}


def test_missing_sizes_of_heads_follow_from_the_others(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "n_layer": 1, "n_head": 4, "n_embd": 32, "vocab_size": 10, "n_positions": 16})
    )
    size = model_size(tmp_path)
    assert (size.heads, size.kv_heads, size.head_dim, size.context) == (4, 4, 8, 16)


def test_a_directory_without_a_language_model_is_refused(tmp_path):
    for config in ("{}", '{"model_type": "no_such_type"}', '{"model_type": "vit"}'):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(UserError, match="cannot be trained"):
            model_size(tmp_path)


@pytest.mark.parametrize(
    ("configured", "expected"), [(7, [END, 7]), ([9, 7, END], [END, 7, 9]), (None, [END]), ("no file", [END])]
)
def test_end_tokens_are_the_tokenizers_and_the_generation_configs(tmp_path, configured, expected):
    file = save_tiny_model(tmp_path) / "generation_config.json"
    file.unlink() if configured == "no file" else file.write_text(json.dumps({"eos_token_id": configured}))
    assert end_token_ids(tmp_path, load_tokenizer(tmp_path)) == expected


# Loading


def save_changed_head(directory, kind, value):
    torch.manual_seed(0)
    small = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 1.0,  # logits of some tens, so that capping at 30 shows
    }
    if kind == "capped":
        Gemma2ForCausalLM(Gemma2Config(**small, head_dim=16, final_logit_softcapping=value)).save_pretrained(directory)
    else:
        GraniteForCausalLM(GraniteConfig(**small, logits_scaling=value)).save_pretrained(directory)


@pytest.mark.parametrize(("kind", "value"), [("capped", 30.0), ("scaled", 8.0), ("capped", None), ("scaled", 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_cap_or_scale_their_logits_are_loaded(tmp_path, kind, value, dtype):
    save_changed_head(tmp_path, kind, value)
    policy = load_policy(tmp_path, dtype=dtype, device=torch.device("cpu"))
    assert policy.dtype == dtype
    assert not policy.training


# Replacing a directory


def test_a_directory_is_replaced_only_if_the_block_succeeds(tmp_path):
    target = tmp_path / "some" / "policy"
    with replaced_directory(target) as staging:
        (staging / "old").write_text("old")
        assert not target.exists()

    def fail():
        with replaced_directory(target) as staging:
            (staging / "new").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert {path.name: path.read_text() for path in target.iterdir()} == {"old": "old"}
    assert list(target.parent.iterdir()) == [target]  # the failed attempt leaves nothing

    with replaced_directory(target) as staging:
        (staging / "new").write_text("new")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"new": "new"}
    assert list(target.parent.iterdir()) == [target]


def test_a_directory_is_there_at_every_moment_while_it_is_replaced(tmp_path, monkeypatch):
    target, rename = tmp_path / "policy", Path.rename
    target.mkdir()
    (target / "old").touch()

    def noted(path, to):
        present = [list(place.iterdir()) for place in tmp_path.iterdir()]
        assert any(files and files[0].name == "old" for files in present)  # under some name, until the new one is there
        if to == target and path.name.endswith("-old"):
            return rename(path, to)
        if to == target:
            raise OSError("the disk is gone")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", noted)
    with pytest.raises(OSError, match="the disk is gone"), replaced_directory(target) as staging:
        (staging / "new").touch()
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


# Saving


def test_a_saved_policy_has_the_given_weights_and_its_bases_config(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    # Published models have such files, which transformers reads but does not write: top_k without do_sample.
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, 9], "top_k": 7}))
    policy = load_policy(base, **CPU)
    tensors = {name: 1.001 * parameter.detach() for name, parameter in policy.named_parameters()}
    target = tmp_path / "runs" / "policy"
    for factor in (1, 2):  # the second replaces the first
        save_policy({name: factor * tensor for name, tensor in tensors.items()}, base, target)
        saved = AutoModelForCausalLM.from_pretrained(target)
        assert saved.dtype == torch.bfloat16
        assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
        found = dict(saved.named_parameters())
        assert {x.dtype for x in load_file(target / "model.safetensors").values()} == {torch.bfloat16}
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(found[name], (factor * tensor).bfloat16()), name
        assert load_tokenizer(target)("a1 b2")["input_ids"] == load_tokenizer(base)("a1 b2")["input_ids"]
        assert end_token_ids(target, load_tokenizer(target)) == [END, 9]
        assert model_size(target) == model_size(base)
    assert list(target.parent.iterdir()) == [target]


def test_a_loaded_policy_attends_within_packed_sequences(tmp_path):
    policy = load_policy(save_tiny_model(tmp_path), **CPU)
    once = torch.arange(ROW_MULTIPLE)  # equal bits need whole vectors
    ids, positions = (once + 5).repeat(2)[None], once.repeat(2)[None]
    with torch.no_grad():
        logits = policy(ids, position_ids=positions, lengths=Lengths([ROW_MULTIPLE, ROW_MULTIPLE])).logits[0]
        whole = policy(ids, position_ids=positions, lengths=Lengths([2 * ROW_MULTIPLE])).logits[0]
    assert torch.equal(logits[:ROW_MULTIPLE], logits[ROW_MULTIPLE:])
    assert not torch.allclose(whole[:ROW_MULTIPLE], whole[ROW_MULTIPLE:], atol=1e-3)
