"""Settings of reward sources: one class for each kind. Runs anywhere.

Sources are named in reward.sources, evaluation.judges and labeller.sources. actors/scoring/kinds.py says which code
belongs to a kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias, Union
from urllib.parse import parse_qsl, urlsplit

from pydantic import Discriminator, Field, Tag

from common.config.base import NonNegative, Positive, Seconds, Section
from common.data.source_names import is_reasoning_gym

_HEADER = re.compile(r"[A-Za-z0-9-]{1,64}")
VARIABLE = re.compile(r"(?:(?P<scheme>[A-Za-z]+) )?env:(?P<name>[A-Za-z_][A-Za-z0-9_]*)")  # the value of a header
_SECRET = re.compile(r"auth|key|token|secret|passw|cookie|credential|signature", re.IGNORECASE)
_HEADERS = 'headers = { Authorization = "Bearer env:NAME_OF_A_VARIABLE" }'


class RewardSource(Section):
    """A source of raw scores for responses. `key`: the setting that only this kind of source has. `decide`: the
    settings that decide a score, which excludes settings of speed and the places of files and services."""

    key: ClassVar[str]
    decide: ClassVar[tuple[str, ...]] = ()

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", max_length=64)]
    """The name of its raw score in the log, in the journal and on the screen."""
    weight: float = 1.0
    """Factor of its raw score: score = sum of weight * raw score. The weight of a judge has no effect."""

    @property
    def scoring(self) -> dict[str, Any]:
        """The kind of the source and the settings that decide a score, as JSON has them."""
        return {"kind": self.key, **self.model_dump(mode="json", include=set(self.decide))}

    def broken_rules(self) -> Iterator[str]:
        """Faults that no single field shows; each message says rule, value and remedy."""
        yield from ()


class FunctionSourceConfig(RewardSource):
    """A Python function."""

    key = "function"
    decide = ("function",)
    function: str
    """`module:function`, def or async def. It takes a RewardInput and returns a number, or a dict with the number under
    "score" and further numbers for the metrics. docs/rewards.md explains both."""
    takes: Literal["annotated", "answer", "list"] = "annotated"
    """Argument of the function. answer: one RewardInput. list: a list of RewardInputs, for which the function returns a
    list of results. annotated: as the parameter's annotation says (list[RewardInput]: list); without one: answer."""
    batch: Positive = 32
    """Most answers in one call of a function that takes a list. A call never waits for more answers to come."""
    concurrency: Positive = 16
    """Most calls of an async function that overlap, in each reward process. Other functions are called one at a
    time."""


class ModelSourceConfig(RewardSource):
    """A reward model: a Hugging Face sequence classifier with one label."""

    key = "model"
    decide = ("dtype", "max_tokens")
    model: str
    """A directory that ratchet train-reward has written, another Hugging Face directory, or a hub name. If it holds the
    mean and deviation of the reference policy's own scores, a raw score is the number of deviations from that mean."""
    trust_remote_code: bool = False
    """Allow Python code from the model's directory to run. Such code can do everything that you can."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the forward pass; the head is float32 either way."""
    max_tokens: Positive = 2048
    """Longest prompt and response together. If they are longer, the model does not see the beginning of the prompt."""
    max_batch_tokens: Positive = 4096
    """Most tokens in one forward pass, padding included. More is faster until memory or cache runs out."""
    batch_window_ms: Annotated[float, Field(ge=0)] = 5
    """Time that a request waits for others to share its forward pass, milliseconds."""

    def broken_rules(self) -> Iterator[str]:
        if self.max_batch_tokens < self.max_tokens:
            yield (
                f"max_batch_tokens ({self.max_batch_tokens}) must hold the longest sequence, max_tokens "
                f"({self.max_tokens}); raise the first or lower the second"
            )


class ServiceConfig(RewardSource):
    """Settings that all services behind HTTP have."""

    headers: Mapping[str, str] = {}
    """Headers of every request. In a value such as "env:JUDGE_KEY" or "Bearer env:JUDGE_KEY", the environment variable
    JUDGE_KEY of the process that starts the run is filled in. Headers with keys must use this: no file then has a
    key."""
    concurrency: Positive = 16
    """Most unanswered requests of each reward process, over all addresses."""
    request_timeout_s: Seconds = 10
    """Longest wait for one complete answer, seconds."""
    max_answer_kib: Positive = 1024
    """Longest answer that is accepted, after decompression, KiB."""
    retries: NonNegative = 3
    """Retries after a failure, at another address if there is one. If the last one fails, the rollout is void. An
    address that refuses a request for good (HTTP 4xx, except 408, 425 and 429) does not get this request again."""
    backoff_s: Seconds = 0.5
    """Pause before the first retry, seconds. It doubles before each later one. A Retry-After header makes it longer for
    the address that sent it."""
    follow_redirects: bool = False
    """Follow redirects. Headers are not sent on to another host or port. Off: a redirect is a failure."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """The service's addresses: the value of the setting `key`."""
        return getattr(self, self.key)

    def broken_rules(self) -> Iterator[str]:
        for url in self.addresses:
            yield from _broken_address_rules(self.key, url)
        for name, value in self.headers.items():
            yield from _broken_header_rules(name, value)


class HttpSourceConfig(ServiceConfig):
    """An HTTP service."""

    key = "urls"
    urls: Annotated[tuple[str, ...], Field(min_length=1)]
    """Addresses of the service. It gets the RewardInput as JSON in a POST and answers {"score": number}; it may add
    {"model": "name and version"} for the journal. A request goes to the address with the fewest unanswered ones."""
    batch: Positive | None = None
    """Send up to this many answers in one request, as {"answers": [...]}. The service then answers {"scores": [...]} in
    the same order. Left out: one answer per request, in the form above."""
    send_tokens: bool = False
    """Also send prompt_ids, response_ids and raw_response, the text with its special tokens."""


class JudgeSourceConfig(ServiceConfig):
    """A language model behind an OpenAI-compatible service (chat completions) that writes its score as text."""

    key = "judge_urls"
    decide = ("judge_model", "template", "system", "score_range", "score_pattern", "score_field", "request")
    judge_urls: Annotated[tuple[str, ...], Field(min_length=1)]
    """Addresses of the service up to the version, such as http://127.0.0.1:8000/v1. A request goes to the address with
    the fewest unanswered ones."""
    judge_model: Annotated[str, Field(min_length=1, max_length=200)]
    """The model's name at the service."""
    template: str
    """The message to the judge. {prompt}, {response} and {fields.NAME} are filled in; other braces stay. Of a chat
    prompt {prompt} has the messages, without the template of the policy."""
    system: str | None = None
    """The system message, with the same placeholders. Left out: none."""
    score_range: tuple[float, float]
    """Lowest and highest score that is accepted. Any other score is a failure."""
    score_pattern: str = r"[Ss]core[^\w(.\[\u2212-]{0,5}(-?\d{1,9}(?:\.\d{1,9})?)(?![.,]?\d|\s*[-\u2013\u2212]\s*\d)"
    """Regular expression whose first group is the score. The last match in the judge's text counts. The default reads
    `Score: 7.5` and `**Score**: 8/10`. A range such as 7-8, `.5` or `7,5` is no match."""
    score_field: str | None = None
    """Read the judge's text as a JSON object and take the score from this field. Left out: score_pattern is used."""
    request: Mapping[str, Any] = {"temperature": 0, "max_tokens": 512}
    """More entries of the request, such as temperature and max_tokens. Your table replaces the whole default table."""

    def broken_rules(self) -> Iterator[str]:
        yield from super().broken_rules()
        if "{response}" not in self.template:
            yield "template must have {response} in it, or the judge does not see the response"
        low, high = self.score_range
        if not low < high:
            yield f"score_range must be [lowest, highest], not [{low:g}, {high:g}]"
        yield from _broken_pattern_rules("score_pattern", self.score_pattern, "number")
        if own := sorted({"model", "messages", "stream", "n"} & self.request.keys()):
            yield f"request must not have {own[0]}, which Ratchet sets itself; remove it"


class ReasoningGymSourceConfig(RewardSource):
    """The rule of the reasoning-gym task that the prompt is from (prompts.train = "reasoning-gym:TASK")."""

    key = "reasoning_gym"
    decide = ("answer_pattern",)
    reasoning_gym: Literal[True]
    """Score with the task's own rule, whose result usually is from 0 to 1; many tasks give a part of the score for a
    wrong answer. All prompts must be of reasoning-gym:TASK. docs/rewards.md explains it."""
    answer_pattern: str | None = None
    """Regular expression whose first group is the answer in a response, such as (?s)<answer>(.*?)</answer>. The last
    match counts; without one there is no answer, which the task scores too. Left out: the whole response."""
    run_answers: bool = False
    """Allow tasks whose rule runs responses as Python code, with your rights (n_queens, countdown and others). This
    needs isolation = "process"."""

    def broken_rules(self) -> Iterator[str]:
        if self.answer_pattern is not None:
            yield from _broken_pattern_rules("answer_pattern", self.answer_pattern, "answer")


class EnvironmentSourceConfig(RewardSource):
    """The rewards of the environment's turns."""

    key = "environment"
    environment: Literal[True]
    """Score with the sum of the rewards that the environment gave in its steps. This needs [environment]. Each turn's
    reward counts at the turn's last token."""


_KINDS = (
    FunctionSourceConfig,
    ModelSourceConfig,
    HttpSourceConfig,
    JudgeSourceConfig,
    ReasoningGymSourceConfig,
    EnvironmentSourceConfig,
)
SOURCE_KINDS: dict[str, type[RewardSource]] = {kind.key: kind for kind in _KINDS}
*_FIRST_KEYS, _LAST_KEY = SOURCE_KINDS


def _kind_key(source: Any) -> str | None:
    """The key of SOURCE_KINDS that a source has; None if it has none of them, or several."""
    given = source if isinstance(source, Mapping) else getattr(source, "__dict__", {})
    keys = [key for key in SOURCE_KINDS if key in given]
    return keys[0] if len(keys) == 1 else None


if TYPE_CHECKING:
    SourceConfig: TypeAlias = RewardSource
else:
    SourceConfig = Annotated[
        Union[tuple(Annotated[kind, Tag(key)] for key, kind in SOURCE_KINDS.items())],  # noqa: UP007
        Discriminator(
            _kind_key,
            custom_error_type="source_kind",
            custom_error_message=f"a source must have exactly one of {', '.join(_FIRST_KEYS)} and {_LAST_KEY}",
        ),
    ]


def broken_source_rules(
    key: str, sources: Sequence[RewardSource], *, others: Sequence[RewardSource] = ()
) -> Iterator[str]:
    """One message for each broken rule of the setting `key`, and of `others`, whose names must differ from its own."""
    if not sources:
        yield f"{key} is empty, so nothing could be learned; name at least one [[{key}]]"
    names = [source.name for source in (*sources, *others)]
    if len(set(names)) < len(names):
        yield f"{key} must have different names, not {names}; rename one"
    for source in (*sources, *others):
        yield from (f"reward source {source.name}: {fault}" for fault in source.broken_rules())


def broken_reasoning_gym_rules(
    sources: Sequence[RewardSource], prompts: Mapping[str, str | None], *, key: str, isolation: str
) -> Iterator[str]:
    """One message for each broken rule of sources with `reasoning_gym`. prompts: the sources of prompts, by setting.
    isolation: the value of the setting `key`."""
    for source in sources:
        if not isinstance(source, ReasoningGymSourceConfig):
            continue
        for setting, named in prompts.items():
            # Some rules call eval on fields of the record. A data set from elsewhere could run any code.
            if named is not None and not is_reasoning_gym(named):
                yield (
                    f'reward source {source.name}: {setting} ({named}) must be "reasoning-gym:TASK", because rules of '
                    "reasoning-gym may run a record's fields as Python code; name a task, or use another kind of source"
                )
        if source.run_answers and isolation != "process":
            yield (
                f'reward source {source.name}: run_answers (true) needs {key} = "process" (it is "{isolation}"), where '
                "a response that ends its process costs one rollout; set it"
            )


def broken_environment_source_rules(sources: Sequence[RewardSource], *, remedy: str) -> Iterator[str]:
    """One message for each source with `environment`, in a command or a run that has no environment."""
    for source in sources:
        if isinstance(source, EnvironmentSourceConfig):
            yield (
                f"reward source {source.name}: environment (true) needs an environment, whose rewards it adds up, and "
                f"there is none; {remedy}"
            )


def _broken_pattern_rules(key: str, pattern: str, what: str) -> Iterator[str]:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        yield f"{key} ({pattern}) must be a regular expression, but has a fault ({error}); correct it"
    else:
        if not groups:
            yield f"{key} ({pattern}) must have a group that matches the {what}; put that part in parentheses"


def _broken_address_rules(key: str, url: str) -> Iterator[str]:
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        known = False
    if not known or not url.isprintable():
        yield f"{_without_secrets(url)!r} in {key} must begin with http:// or https://"
    elif parts.username is not None or parts.password is not None:
        yield (
            f"the address {_without_secrets(url)} has a user name or password in it, which the journal would show; "
            f"remove it, and set {_HEADERS}"
        )
    elif secret := [key for key, _ in parse_qsl(parts.query) if _SECRET.search(key)]:
        yield (
            f"the address {_without_secrets(url)} has {secret[0]} in it, which the config would show; remove it, and "
            f"set {_HEADERS}"
        )


def _broken_header_rules(name: str, value: str) -> Iterator[str]:
    if not _HEADER.fullmatch(name):
        yield f"{name[:80]!r} is not a header name; a header name has only letters, digits and -"
    elif VARIABLE.fullmatch(value):
        return
    elif "env:" in value:
        yield f'headers.{name} must be of the form "env:JUDGE_KEY" or "Bearer env:JUDGE_KEY"'
    elif _SECRET.search(name) or not (value.isascii() and value.isprintable()):
        yield (
            f"headers.{name} must not be written in the config; put its value into an environment variable, and set "
            f'headers.{name} = "env:NAME_OF_THE_VARIABLE"'
        )


def _without_secrets(url: str) -> str:
    """The address without user, password and query."""
    scheme, separator, rest = url.partition("://")
    host = re.split(r"[?#]", rest)[0].rpartition("@")[2]
    return f"{scheme}{separator}{host}" if separator else re.split(r"[?#]", url)[0].rpartition("@")[2]
