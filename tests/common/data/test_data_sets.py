"""Data sets of the package `datasets`, from directories and from the hub, give the rows that they were made of."""

import json
import shutil
import sys
from datetime import date

import pytest

from common.config.actors import PromptsConfig
from common.config.reward_model import PreferencesConfig
from common.data.prompt_records import load_records
from common.data.records import read_source
from common.errors import UserError
from common.model.files import load_tokenizer
from learner.reward_model.pair_records import tokenise_pairs
from learner.reward_model.pairs import Pairs
from tests.fakes import save_tiny_model
from tests.record_files import write

datasets = pytest.importorskip("datasets")

TRAIN = [
    {
        "question": f"ask a{i}",
        "answer": i,
        "chat": [{"role": "user", "content": f"ask a{i}"}],
        "day": None if i else date(2026, 11, 26),
    }
    for i in range(6)
]
TEST = [{**row, "question": f"ask b{i}", "answer": -i} for i, row in enumerate(TRAIN[:4])]
AS_JSON = [json.loads(json.dumps(row, default=date.isoformat)) for row in TRAIN]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Data sets with the same rows in every form, and the cache that the package uses."""
    place = tmp_path_factory.mktemp("data_sets")
    datasets.utils.disable_progress_bars()
    train, test = datasets.Dataset.from_list(TRAIN), datasets.Dataset.from_list(TEST)
    datasets.DatasetDict(train=train, test=test).save_to_disk(place / "saved")
    train.save_to_disk(place / "alone")
    for form in ("files", "jsonl", "configs"):
        (place / form).mkdir()
    write(place / "files" / "train-00000-of-00001.parquet", TRAIN)
    write(place / "files" / "test-00000-of-00001.parquet", TEST)
    write(place / "jsonl" / "train.jsonl", AS_JSON)
    write(place / "configs" / "main.parquet", TRAIN)
    write(place / "configs" / "other.parquet", TEST)
    (place / "configs" / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files: main.parquet\n"
        "- config_name: other\n  data_files: other.parquet\n---\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
        yield place
    datasets.utils.enable_progress_bars()
    shutil.rmtree(place / "cache")


def questions(source, setting="prompts.train"):
    return [record["question"] for _, record in read_source(str(source), setting, seed=0)]


def refusal(source, setting="prompts.train"):
    with pytest.raises(UserError) as caught:
        questions(source, setting)
    return str(caught.value)


TRAINED, HELD = ([row["question"] for row in rows] for rows in (TRAIN, TEST))


@pytest.mark.parametrize("form", ["saved", "alone", "files", "configs?config=main"])
def test_every_form_of_a_data_set_gives_its_rows_as_json(directories, form):
    read = list(read_source(f"{directories}/{form}", "prompts.train", seed=0))
    assert [record for _, record in read] == AS_JSON
    assert read[1][0] == f"{directories}/{form}, row 2"


def test_json_lines_in_a_directory_are_a_data_set(directories):
    assert questions(directories / "jsonl") == TRAINED


@pytest.mark.parametrize("form", ["saved", "files"])
def test_the_split_is_train_or_test_or_the_one_that_is_named(directories, form):
    source = f"{directories}/{form}"
    assert questions(source, "prompts.train") == TRAINED
    assert questions(source, "data.heldout") == HELD
    assert questions(f"{source}?split=test", "prompts.train") == HELD
    assert questions(f"{source}?split=train[:50%]") == TRAINED[:3]
    assert questions(f"{source}?split=train[-2:]", "prompts.heldout") == TRAINED[-2:]
    assert questions(f"{source}?split=train+test") == TRAINED + HELD


def test_a_data_set_that_was_saved_alone_may_be_sliced(directories):
    assert questions(directories / "alone", "prompts.heldout") == TRAINED  # it has no split `test`
    assert questions(f"{directories}/alone?split=train[2:4]") == TRAINED[2:4]


def test_a_name_on_the_hub_is_loaded_with_config_split_and_revision(directories, monkeypatch):
    load, asked = datasets.load_dataset, []

    def from_the_hub(path, name=None, *, split, revision):
        assert path.startswith("hf://datasets/")  # so that `datasets` looks at no directory of this name
        asked.append((path.removeprefix("hf://datasets/"), name, split, revision))
        return load(str(directories / "configs"), name, split=split)

    monkeypatch.setattr(datasets, "load_dataset", from_the_hub)
    assert questions("hf:openai/gsm8k?config=other&split=train[:2]&revision=e5") == HELD[:2]
    assert questions("hf:openai/gsm8k?config=main") == TRAINED
    assert asked == [("openai/gsm8k", "other", "train[:2]", "e5"), ("openai/gsm8k", "main", "train", None)]
    message = refusal("hf:openai/gsm8k", "prompts.heldout")
    assert message.startswith(
        "prompts.heldout (hf:openai/gsm8k), split test, cannot be read (ValueError: Config name is"
    )
    assert "['main', 'other']" in message


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "saved?split=dev",
            "split dev, cannot be read (ValueError: Unknown split \"dev\". Should be one of ['train', ",
        ),
        ("alone?config=main", "(ValueError: save_to_disk wrote this directory, so it has no configs); name config and"),
        ("configs?config=x", "(ValueError: BuilderConfig 'x' not found. Available: ['main', 'other']); name config"),
        ("empty", "split train, cannot be read (EmptyDatasetError: "),
    ],
)
def test_a_data_set_that_cannot_be_read_is_refused(directories, source, reason):
    (directories / "empty").mkdir(exist_ok=True)
    assert reason in refusal(directories / source)


def test_without_the_package_the_message_says_what_to_install(directories, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in ("hf:openai/gsm8k", str(directories / "saved")):
        needs = "needs the package datasets, which is not installed; call pip install datasets"
        assert refusal(source) == f"prompts.train ({source}) {needs}"


@pytest.mark.parametrize("form", ["saved", "files", "files/train-*.parquet"])
def test_chat_prompts_in_a_named_column_keep_their_messages(directories, tmp_path, form):
    tokenizer = load_tokenizer(save_tiny_model(tmp_path))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    cfg = PromptsConfig(train=f"{directories}/{form}", format="chat", columns={"prompt": "chat"})
    prompts = load_records(cfg.train, cfg, tokenizer, seed=0, max_tokens=20)
    assert [(prompt.text, prompt.messages) for prompt in prompts] == [(row["question"], row["chat"]) for row in TRAIN]
    assert prompts[0].fields == {"question": "ask a0", "answer": 0, "day": "2026-11-26"}


def test_preference_pairs_may_be_a_data_set(directories, tmp_path):
    rows = [{"q": "ask a1", "better": f"b{i}", "worse": f"c{i}"} for i in range(3)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "pairs")
    tokenizer = load_tokenizer(save_tiny_model(tmp_path / "model"))
    columns = {"prompt": "q", "chosen": "better", "rejected": "worse"}
    cfg = PreferencesConfig(train=str(tmp_path / "pairs"), columns=columns)
    assert tokenise_pairs(cfg.train, cfg, tokenizer, tmp_path / "pairs.arrow").pairs == 3
    assert [Pairs(tmp_path / "pairs.arrow").prompt(i) for i in range(3)] == ["ask a1"] * 3
