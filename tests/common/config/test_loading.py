"""Configuration files: messages of faults, overrides, the search for files, and loading back a resolved config."""

import os
import tomllib
from pathlib import Path

import pytest
import tomli_w
from pydantic import ValidationError

from common.config.loading import load_config
from common.config.ppo import Config
from common.config.reward_model import PairSamplingConfig, RewardTrainingConfig
from common.errors import UserError
from tests.common.config.trees import ONE_KIND, TREES, leaves, root_of

SHIPPED = sorted((Path(__file__).parents[3] / "deploy" / "configs").glob("*.toml"))
MINIMAL = """
[prompts]
train = "questions.jsonl"

[[reward.sources]]
name = "correct"
function = "tasks:correct"

[[reward.sources]]
name = "short"
function = "tasks:short"
weight = -0.5
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "minimal.toml"
    path.write_text(MINIMAL)
    return path


def refusal(path, *overrides, root=Config):
    with pytest.raises(UserError) as caught:
        load_config(path, overrides, root)
    return str(caught.value)


def test_a_config_that_comes_through_a_pipe_can_be_loaded_twice():
    """As in `ratchet tune <(make-config) ...`: the first reader empties the pipe."""
    for steps in (7, 8):
        reading, writing = os.pipe()
        os.write(writing, f"num_steps = {steps}\n{MINIMAL}".encode())
        os.close(writing)
        path = Path(f"/dev/fd/{reading}")
        loaded = [load_config(path, [f"seed={seed}"], Config) for seed in (1, 2)]
        os.close(reading)
        assert [(cfg.num_steps, cfg.seed) for cfg in loaded] == [(steps, 1), (steps, 2)]


# Messages of faults


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_stepz=3", "num_stepz: unknown key; did you mean num_steps?"),
        ("ppo.clip_epsilon=0.1", "ppo.clip_epsilon: unknown key; did you mean clip_eps?"),
        ("reward.sources.1.wieght=2", "reward.sources.1.wieght: unknown key; did you mean weight?"),
        ("optimiser.eps=1", "optimiser: unknown key; did you mean optimizer?"),
        ("model.zzz=1", "model.zzz: unknown key; known here: path, trust_remote_code"),
        ("learner.lora.rnk=1", "learner.lora.rnk: unknown key; did you mean rank?"),
        ("learning_rate=1", "learning_rate: unknown key; did you mean optimizer.learning_rate?"),
        ("reward.temperature=1", "reward.temperature: unknown key; did you mean sampling.temperature?"),
        (
            "max_tokens=1",
            "max_tokens: unknown key; did you mean prompts.max_tokens or environment.max_tokens?",
        ),
        (
            "threads=2",
            "threads: unknown key; did you mean generators.threads or reference.threads or reward.threads or "
            "environment.threads or learner.threads?",
        ),
        (
            "model.weigth=1",
            "model.weigth: unknown key; known here: path, trust_remote_code",
        ),  # a section, not a source with a model
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_valid_name(minimal, override, message):
    assert refusal(minimal, override).splitlines()[1:] == [f"  {message}"]


@pytest.mark.parametrize(
    ("kind", "key", "message"),
    [
        ('function = "m:f"', "wieght", "did you mean weight?"),
        (
            'function = "m:f"',
            "min_length",
            "known here: name, weight, function, takes, batch, concurrency",
        ),  # only a service has urls
        ('model = "m"', "max_tokns", "did you mean max_tokens?"),
        ('model = "m"', "batch_window", "did you mean batch_window_ms?"),
        (
            'model = "m"',
            "retries",
            "known here: name, weight, model, trust_remote_code, dtype, max_tokens, max_batch_tokens, batch_window_ms",
        ),
        ('urls = ["http://h"]', "retires", "did you mean retries?"),
        ('urls = ["http://h"]', "url", "did you mean urls?"),
        (
            'urls = ["http://h"]',
            "dtype",
            "known here: name, weight, headers, concurrency, request_timeout_s, max_answer_kib, retries, backoff_s, "
            "follow_redirects, urls, batch, send_tokens",
        ),
    ],
)
@pytest.mark.parametrize(
    ("list_key", "before", "root"),
    [
        ("reward.sources", '[prompts]\ntrain = "t"\n', Config),
        ("evaluation.judges", MINIMAL, Config),
        ("labeller.sources", '[prompts]\nsource = "t"\n', PairSamplingConfig),
    ],
)
def test_an_unknown_key_of_a_source_is_refused_with_its_kinds_keys(
    tmp_path, list_key, before, root, kind, key, message
):
    path = tmp_path / "sources.toml"
    path.write_text(f'{before}\n[[{list_key}]]\nname = "s"\n{kind}\n{key} = 1\n')
    assert refusal(path, root=root) == f"config {path} has 1 fault(s):\n  {list_key}.0.{key}: unknown key; {message}"


@pytest.mark.parametrize(
    "keys",
    ["", 'functoin = "m:f"', 'function = "m:f"\nmodel = "m"', 'function = "m:f"\nmodel = "m"\nurls = ["http://h"]'],
)
@pytest.mark.parametrize("list_key", ["reward.sources", "evaluation.judges"])
def test_a_source_without_exactly_one_kind_is_refused_in_one_line(minimal, list_key, keys):
    minimal.write_text(f'{MINIMAL}\n[[{list_key}]]\nname = "s"\n{keys}\n')
    first, *lines = refusal(minimal).splitlines()
    assert first.endswith("has 1 fault(s):")
    assert len(lines) == 1
    assert lines[0].startswith(f"  {list_key}.{2 if list_key == 'reward.sources' else 0} = ")
    assert lines[0].endswith(f": {ONE_KIND}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward.sources.0.function=3", "reward.sources.0.function = 3: input should be a valid string"),
        ('reward.sources=[{function="m:f"}]', "reward.sources.0.name: required and missing"),
        ('reward.sources=[{name="s",urls=["http://h",3]}]', "reward.sources.0.urls.1 = 3: input should be a"),
        ('evaluation.judges=[{name="s",model="m",dtype="fp8"}]', "evaluation.judges.0.dtype = 'fp8': "),
        ("sampling.temperature=0", "sampling.temperature = 0: input should be greater than or equal to 0.01"),
        ("learner.precision=fp16", "learner.precision = 'fp16': input should be 'bf16' or 'fp32'"),
        ("num_steps=many", "num_steps = 'many': input should be a valid integer"),
        ("max_staleness=-1", "max_staleness = -1: input should be greater than or equal to 0"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas.1 = 1: input should be less than 1"),
        ("reward.sources.0.weight=nan", "reward.sources.0.weight = nan: input should be a finite number"),
        ("prompts={}", "prompts.train: required and missing"),
        ("num_steps=0", "num_steps = 0: input should be greater than or equal to 1"),
        ("generators.min=1000000000", "generators.min = 1000000000: input should be less than or equal to 10000"),
        ("reward.max=1000000000", "reward.max = 1000000000: input should be less than or equal to 10000"),
        ("learner.ranks=1000000000", "learner.ranks = 1000000000: input should be less than or equal to 10000"),
    ],
)
def test_a_fault_is_reported_with_its_key_in_the_file(minimal, override, message):
    first, *lines = refusal(minimal, override).splitlines()
    shown = f"{override.partition('=')[0]}=..." if "{" in override else override
    assert first == f"the command line ({shown}) has 1 fault(s):"
    assert [line[: len(message) + 2] for line in lines] == [f"  {message}"]


def test_a_message_about_a_source_shows_none_of_its_values(minimal):
    source = '{name="a", urls=["http://me:sekret@host"], headers={Authorization="Bearer sekret"}, function="m:f"}'
    assert "{name, urls, headers, function}: a source must have exactly one" in refusal(
        minimal, f"reward.sources=[{source}]"
    )
    for override in (
        f"reward.sources=[{source}]",
        f"reward.sources.0={source}",
        "reward.sources=http://me:sekret@host",
        f"seed=[{source}]",
        'reward.sources=[{name="a", urls=["http://host"], headers={Authorization="Bearer sekret"}}]',
    ):
        assert "sekret" not in refusal(minimal, override)


def test_faults_of_file_and_command_line_are_distinguished(minimal):
    minimal.write_text(MINIMAL + "\n[ppo]\ngamma = 2\nminibatches = 4\n")
    assert refusal(minimal).startswith(f"config {minimal} has 1 fault(s):")
    assert refusal(minimal, "seed=3").startswith(f"config {minimal} has 1 fault(s):")
    assert refusal(minimal, "ppo.lam=3").startswith(f"config {minimal} with ppo.lam=3 has 2 fault(s):")
    # A rule about several settings is broken by those of the file and of the command line together.
    broken = refusal(minimal, "seed=3", "ppo.gamma=1", "rollouts_per_step=6")
    assert broken.startswith(f"config {minimal} with rollouts_per_step=6 has 1 fault(s):")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward.sources.².weight=1", "reward.sources.² is not a section, so it has no weight"),
        (f"reward.sources.{'0' * 5000}.weight=1", "is not a section, so it has no weight"),
        ("num_steps=" + "1" * 5000, "num_steps = '1111"),
        ("reward.sources=" + "[" * 3000, "nests brackets too deeply"),
        ("a." * 3000 + "b=1", "no setting is in more than 8 sections"),
        ('model.path="a\\u0000b"', "a text has a NUL character in it; remove it"),
        ('reward.sources=[{name="a",function="m:f\\u0000"}]', "a text has a NUL character in it; remove it"),
        ("model.path=\udcff", "is not valid UTF-8"),
        ("seed\udcff=1", "is not valid UTF-8"),
        ("x" * 5000 + "=1", "unknown key; known here: seed"),
    ],
)
def test_malformed_overrides_are_refused_in_a_short_message(minimal, override, message):
    text = refusal(minimal, override)
    assert message in text
    assert len(text) < 1500


@pytest.mark.parametrize(
    "content", ["seed = " + "1" * 5000, "a = " + "[" * 3000, ".".join("a" * 3000) + " = 1", 'a = "\\u0000"', "a = \x00"]
)
def test_a_malformed_file_is_refused_by_name(minimal, content):
    minimal.write_text(content)
    text = refusal(minimal)
    assert str(minimal) in text
    assert len(text) < 1500


def test_an_impossible_file_name_stays_unchanged(minimal):
    long = "x" * 5000
    cfg = load_config(minimal, [f"model.path={long}", f"prompts.train={long}.jsonl"], Config)
    assert (cfg.model.path, cfg.prompts.train) == (long, f"{long}.jsonl")
    assert "cannot be read" in refusal(Path(f"{long}.toml"))
    assert "not valid TOML" in refusal(Path("a\0.toml"))


def test_a_byte_order_mark_is_ignored(minimal):
    minimal.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_config(minimal, [], Config).prompts.train == "questions.jsonl"


# Where files are looked for


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A config in a directory of its own, with data and a model next to it; the current directory is another."""
    home, here = tmp_path / "Проект 設定 é", tmp_path / "here"
    for directory in (home / "data", home / "model", here):
        directory.mkdir(parents=True)
    for name in ("train.jsonl", "data/a.parquet"):
        (home / name).touch()
    (home / "run.toml").write_text(MINIMAL.replace("questions.jsonl", "train.jsonl") + '[model]\npath = "model"\n')
    monkeypatch.chdir(here)
    return home


def test_files_are_found_in_the_current_directory_then_next_to_the_config(home):
    def names():
        given = ["prompts.heldout=data/*.parquet", "evaluation.text=train.jsonl"]
        cfg = load_config(home / "run.toml", given, Config)
        assert cfg.evaluation.text == cfg.prompts.train
        return cfg.model.path, cfg.prompts.train, cfg.prompts.heldout

    there = tuple(str(home / name) for name in ("model", "train.jsonl", "data/*.parquet"))
    assert names() == there
    for name in ("model", "data"):
        Path(name).mkdir()
    for name in ("train.jsonl", "data/b.parquet"):
        Path(name).touch()
    assert names() == tuple(str(Path(name).absolute()) for name in ("model", "train.jsonl", "data/*.parquet"))


def test_the_directory_of_a_data_set_becomes_absolute_and_keeps_its_options(home):
    names = ["prompts.train=data", "prompts.heldout=data?split=train[:9%]"]
    prompts = load_config(home / "run.toml", names, Config).prompts
    assert [prompts.train, prompts.heldout] == [str(home / "data"), f"{home / 'data'}?split=train[:9%]"]


def test_names_of_missing_files_and_of_functions_stay_unchanged(home):
    names = {"prompts.train": "deploy.tasks.larger:prompts", "prompts.heldout": "no.jsonl", "model.path": "org/model"}
    cfg = load_config(home / "run.toml", [f"{key}={name}" for key, name in names.items()], Config)
    assert [cfg.prompts.train, cfg.prompts.heldout, cfg.model.path] == list(names.values())
    names = {"prompts.train": "reasoning-gym:gcd", "prompts.heldout": "hf:org/data?split=test&config=main"}
    cfg = load_config(home / "run.toml", [f"{key}={name}" for key, name in names.items()], Config)
    assert [cfg.prompts.train, cfg.prompts.heldout] == list(names.values())


def test_names_below_the_current_directory_stay_relative_in_a_job(home, monkeypatch):
    monkeypatch.chdir(home.parent)
    cfg = load_config(Path(home.name) / "run.toml", ["prompts.heldout=~/x.jsonl"], Config, keep_relative=True)
    assert (cfg.prompts.train, cfg.prompts.heldout) == (f"{home.name}/train.jsonl", "~/x.jsonl")
    absolute = [f"prompts.train={home / 'train.jsonl'}"]
    assert load_config(home / "run.toml", absolute, Config, keep_relative=True).prompts.train == str(
        home / "train.jsonl"
    )


def test_a_resolved_config_finds_its_files_from_anywhere(home, tmp_path, monkeypatch):
    resolved = tmp_path / "config.toml"
    resolved.write_text(load_config(home / "run.toml", [], Config).to_toml(), encoding="utf-8")
    monkeypatch.chdir("/")
    assert load_config(resolved, [], Config).prompts.train == str(home / "train.jsonl")


def test_an_unknown_key_in_the_file_is_refused_too(minimal):
    minimal.write_text(MINIMAL + "\n[sampling]\ntemprature = 0.7\n")
    assert refusal(minimal) == (
        f"config {minimal} has 1 fault(s):\n  sampling.temprature: unknown key; did you mean temperature?"
    )


def test_several_faults_are_all_reported_at_once(minimal):
    lines = refusal(minimal, "num_stepz=3", "ppo.gamma=2", "reward.sources.0.name=a b").splitlines()
    assert lines[0] == "the command line (num_stepz=3 ppo.gamma=2 reward.sources.0.name=a b) has 3 fault(s):"
    assert sorted(line.split()[0].rstrip(":") for line in lines[1:]) == [
        "num_stepz",
        "ppo.gamma",
        "reward.sources.0.name",
    ]


def test_several_broken_rules_have_a_line_each(minimal):
    lines = refusal(minimal, "sampling.min_new_tokens=300", "num_steps=5", "optimizer.warmup_steps=6").splitlines()
    assert [line.split(" (")[0] for line in lines[1:]] == ["  sampling.min_new_tokens", "  optimizer.warmup_steps"]


def test_broken_toml_is_refused_with_file_and_line(minimal):
    minimal.write_text("num_steps = 3\nseed = = 1\n")
    message = refusal(minimal)
    assert message.startswith(f"config file {minimal} is not valid TOML")
    assert "line 2" in message


def test_a_missing_file_and_a_directory_are_refused_by_name(tmp_path):
    assert f"config file {tmp_path / 'no.toml'} does not exist" in refusal(tmp_path / "no.toml")
    assert f"config {tmp_path} cannot be read (Is a directory)" in refusal(tmp_path)


def test_a_path_through_a_file_is_refused_by_name(minimal):
    assert str(minimal / "run.toml") in refusal(minimal / "run.toml")


@pytest.mark.parametrize(
    ("root", "required"),
    [(Config, ["prompts", "reward"]), (RewardTrainingConfig, ["data"]), (PairSamplingConfig, ["prompts", "labeller"])],
)
def test_required_settings_are_named_when_missing(tmp_path, root, required):
    path = tmp_path / "empty.toml"
    path.write_text("")
    lines = refusal(path, root=root).splitlines()
    assert lines[1:] == [f"  {key}: required and missing" for key in required]


def test_a_file_of_another_command_is_refused_with_the_unknown_keys(minimal):
    message = refusal(minimal, root=RewardTrainingConfig)
    assert "data: required and missing" in message
    assert "prompts: unknown key" in message
    assert "reward: unknown key" in message


# Overrides


def test_overrides_win_over_the_file_at_every_depth(minimal):
    cfg = load_config(
        minimal,
        [
            "num_steps=7",
            "kl.coef=1e-3",
            "reward.sources.0.weight=0.25",
            "reward.sources.1.name=brief",
            "ppo.whiten_advantages=false",
            "optimizer.betas=[0.8, 0.9]",
            "num_steps=8",
        ],
        Config,
    )
    assert (cfg.num_steps, cfg.kl.coef, cfg.ppo.whiten_advantages) == (8, 1e-3, False)  # the last one counts
    assert cfg.optimizer.betas == (0.8, 0.9)
    assert [(s.name, s.function, s.weight) for s in cfg.reward.sources] == [
        ("correct", "tasks:correct", 0.25),
        ("brief", "tasks:short", -0.5),
    ]


def test_overrides_replace_a_source_but_do_not_change_its_kind(minimal):
    cfg = load_config(minimal, ['reward.sources=[{name="s", model="m"}]', "reward.sources.0.dtype=float32"], Config)
    assert [(s.name, s.model, s.dtype) for s in cfg.reward.sources] == [("s", "m", "float32")]
    assert "reward.sources.0 = " in refusal(minimal, "reward.sources.0.model=m")  # it still has its function


def test_bare_words_in_overrides_are_strings(minimal):
    overrides = ["model.path=org/model-1.5", "learner.critic=separate", 'prompts.train="a b.jsonl"']
    cfg = load_config(minimal, overrides, Config)
    assert (cfg.model.path, cfg.learner.critic, cfg.prompts.train) == ("org/model-1.5", "separate", "a b.jsonl")


@pytest.mark.parametrize("override", ["num_steps", "=3"])
def test_an_override_without_key_or_value_is_refused_with_the_form_to_use(minimal, override):
    assert refusal(minimal, override) == f"override {override!r} must read key=value, such as ppo.clip_eps=0.1"


@pytest.mark.parametrize("override", ["reward.sources.2.weight=1", "prompts.train.x=1"])
def test_an_override_inside_a_value_is_refused(minimal, override):
    assert f"override {override!r}" in refusal(minimal, override)


# Files that ship, and files that runs leave


def test_configs_are_shipped():
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_loads_back_from_its_resolved_form(path, tmp_path):
    root = root_of(tomllib.loads(path.read_text(encoding="utf-8")))
    cfg = load_config(path, ["seed=3"], root)
    assert cfg.seed == 3
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(cfg.to_toml(), encoding="utf-8")
    assert load_config(resolved, [], root) == cfg


@pytest.mark.parametrize("name", TREES)
def test_a_resolved_config_of_every_root_loads_back_equal(tmp_path, name):
    root, path, resolved = root_of(TREES[name]), tmp_path / "given.toml", tmp_path / "resolved.toml"
    path.write_text(tomli_w.dumps(TREES[name]), encoding="utf-8")
    cfg = load_config(path, [], root)
    assert cfg == root.model_validate(TREES[name])
    resolved.write_text(cfg.to_toml(), encoding="utf-8")
    again = load_config(resolved, [], root)
    assert again == cfg
    assert again.to_toml() == cfg.to_toml()
    # Every default is written out, so that a run does not change when a default does; only what is left out stays so.
    written = set(leaves(tomllib.loads(cfg.to_toml())))
    unset = {"generators.max", "generators.sleep", "reference.max", "reward.max", "labeller.max", "prompts.heldout",
             "evaluation.pass_source", "evaluation.text", "ray.address", "data.heldout", "scale.policy",
             "ray.prometheus", "ray.grafana", "ray.grafana_dashboards", "ray.object_store_mib",
             "learner.compile", "learner.critic_frozen", "learner.critic_path", "learner.micro_batch_tokens",
             "learner.min_ranks", "monitoring.discovery", "ppo.value_lam", "ppo.clip_eps_high",
             "environment.function", "environment.agent", "environment.verifiers", "environment.max",
                 "reward.call_timeout_s", "labeller.call_timeout_s"}  # fmt: skip
    lists = ("reward.sources", "labeller.sources", "evaluation.judges")
    unset |= {f"{key}[].{name}" for key in lists for name in ("batch", "system", "score_field", "answer_pattern")}
    dumped = cfg.model_dump(mode="json")
    assert set(leaves(dumped)) - written <= unset
    assert written <= set(leaves(dumped))


def test_a_loaded_config_is_frozen(minimal):
    cfg = load_config(minimal, [], Config)
    with pytest.raises(ValidationError, match="frozen"):
        cfg.seed = 1


@pytest.mark.parametrize(("key", "shown"), [("\n", "'\\n'"), ("", "''"), (" a", "' a'"), ("\x1b[31m", "'\\x1b[31m'")])
def test_an_invisible_key_is_quoted_in_the_message(tmp_path, key, shown):
    path = tmp_path / "odd.toml"
    path.write_text(tomli_w.dumps({key: 1, **tomllib.loads(MINIMAL)}))
    assert refusal(path).splitlines()[1].startswith(f"  {shown}: unknown key; known here: seed, ")


def test_a_long_value_in_a_message_does_not_hide_the_remedy(minimal):
    [_, message] = refusal(minimal, f"evaluation.pass_source={'x' * 100_000}").splitlines()
    assert len(message) < 1000
    assert message.startswith("  evaluation.pass_source (xxx")
    assert "must be one of" in message


def test_an_impossible_file_name_is_not_searched_for(minimal):
    name = "a" + "[" * 100_000  # translating such a pattern takes the square of its length
    assert load_config(minimal, [f"prompts.train={name}"], Config).prompts.train == name
