"""Settings of reward sources: functions, models and HTTP services; common/config.py says where they may be named."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import Discriminator, Field, Tag

from common.config.base import NonNegative, Positive, Seconds, Section

_HEADER = re.compile(r"[A-Za-z0-9-]{1,64}")
VARIABLE = re.compile(r"(?:(?P<scheme>[A-Za-z]+) )?env:(?P<name>[A-Za-z_][A-Za-z0-9_]*)")  # of a header's value
_SECRET = re.compile(r"auth|key|token|secret|passw|cookie|credential|signature", re.IGNORECASE)
_HEADERS = 'headers = { Authorization = "Bearer env:NAME_OF_A_VARIABLE" }'


class RewardSource(Section):
    """Where a raw score comes from; its keys say which of the kinds below it is."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", max_length=64)]
    """Under this name its raw score is logged, journalled and shown."""
    weight: float = 1.0
    """Its share in the total: score = sum of weight * raw score. A judge's weight counts nowhere."""


class FunctionSourceConfig(RewardSource):
    """A Python function."""

    function: str
    """`module:function`, def or async def. It takes a RewardInput and returns a number, or a dict with the number under
    "score" and further figures for the metrics; docs/rewards.md explains both."""
    takes: Literal["annotated", "answer", "list"] = "annotated"
    """What one call is given. answer: one RewardInput; list: a list of them, for which a list of results is returned;
    annotated: what the annotation of the function's parameter says, such as list[RewardInput], without one an
    answer."""
    batch: Positive = 32
    """Most answers of one call, where it takes a list: it is given those that wait."""
    concurrency: Positive = 16
    """Calls of an async function that overlap, in each reward process. Others are made one at a time."""


class ModelSourceConfig(RewardSource):
    """A reward model: a Hugging Face sequence classifier with one label."""

    model: str
    """A directory that ratchet train-reward has written, another Hugging Face directory, or a hub name. Its raw score
    is in deviations about the reference policy's own responses where the directory says what those scored."""
    trust_remote_code: bool = False
    """Whether Python code from the model's directory may run. Such code can do whatever you can."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the forward pass; the head is float32 either way."""
    max_tokens: Positive = 2048
    """Longest prompt and response it reads; a longer one loses the beginning of its prompt."""
    max_batch_tokens: Positive = 4096
    """Tokens of one forward pass, padding included; more is faster until memory or cache runs out."""
    batch_window_ms: Annotated[float, Field(ge=0)] = 5
    """How long a request waits for others to share its forward pass, milliseconds."""


class ServiceConfig(RewardSource):
    """What all services behind HTTP have in common."""

    headers: Mapping[str, str] = {}
    """Headers of every request. A value such as "env:JUDGE_KEY" or "Bearer env:JUDGE_KEY" is read from that environment
    variable of the process that starts the run, so that keys are in no file; those that carry keys must be given so."""
    concurrency: Positive = 16
    """Requests outstanding at a time, over all addresses, from each reward process."""
    request_timeout_s: Seconds = 10
    """Longest wait for one whole answer, seconds."""
    max_answer_kib: Positive = 1024
    """Longest answer that is read, unpacked, KiB."""
    retries: NonNegative = 3
    """Further tries after a failure, at another address where there is one; then the rollout is void. What a service
    refuses for good (HTTP 4xx but 408, 425 and 429) is not tried there again."""
    backoff_s: Seconds = 0.5
    """Pause before the first further try, doubled before each next one, seconds. A service's Retry-After lengthens
    it."""
    follow_redirects: bool = False
    """Send the request on to where a service redirects it. Headers go along to the same address only. Off: a redirect
    is a failure."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where its requests go."""
        raise NotImplementedError


class HttpSourceConfig(ServiceConfig):
    """An HTTP service."""

    urls: Annotated[tuple[str, ...], Field(min_length=1)]
    """Addresses of the service: each is POSTed the RewardInput as JSON and answers {"score": number}, and may add
    {"model": "name and version"} for the journal. With several, a request goes to the one with the fewest
    outstanding."""
    batch: Positive | None = None
    """Send up to this many answers in one request, as {"answers": [...]}, for {"scores": [...]} in the same order. Left
    out: one answer a request, in the form above."""
    send_tokens: bool = False
    """Also send prompt_ids, response_ids and raw_response, the text with its special tokens."""

    @property
    def addresses(self) -> tuple[str, ...]:
        return self.urls


class JudgeSourceConfig(ServiceConfig):
    """A language model behind an OpenAI-compatible service (chat completions) that writes its score as text."""

    judge_urls: Annotated[tuple[str, ...], Field(min_length=1)]
    """Addresses up to the version, such as http://127.0.0.1:8000/v1. With several, a request goes to the one with the
    fewest outstanding."""
    judge_model: Annotated[str, Field(min_length=1, max_length=200)]
    """The model's name at the service."""
    template: str
    """What the judge is asked. {prompt}, {response} and {fields.NAME} stand for the rollout's; other braces stay."""
    system: str | None = None
    """The system message, with the same places to fill. Left out: none."""
    score_range: tuple[float, float]
    """Lowest and highest score that counts; another is a failure."""
    score_pattern: str = r"[Ss]core[^\w-]{0,5}(-?\d{1,9}(?:\.\d{1,9})?)"
    """Regular expression whose first group is the score; its last match in the judge's text counts."""
    score_field: str | None = None
    """Read the judge's text as a JSON object, and the score from this field. Left out: by score_pattern."""
    request: Mapping[str, Any] = {"temperature": 0, "max_tokens": 512}
    """Further entries of the request, such as temperature and max_tokens; given here, they replace all of these."""

    @property
    def addresses(self) -> tuple[str, ...]:
        return self.judge_urls


SOURCE_KINDS: dict[str, type[RewardSource]] = {
    "function": FunctionSourceConfig,
    "model": ModelSourceConfig,
    "urls": HttpSourceConfig,
    "judge_urls": JudgeSourceConfig,
}


def _source_kind(source: Any) -> str | None:
    """The one of SOURCE_KINDS whose key a source has; None if it has none of them, or several."""
    given = source if isinstance(source, Mapping) else getattr(source, "__dict__", {})
    kinds = [kind for kind in SOURCE_KINDS if kind in given]
    return kinds[0] if len(kinds) == 1 else None


SourceConfig = Annotated[
    Annotated[FunctionSourceConfig, Tag("function")]
    | Annotated[ModelSourceConfig, Tag("model")]
    | Annotated[HttpSourceConfig, Tag("urls")]
    | Annotated[JudgeSourceConfig, Tag("judge_urls")],
    Discriminator(
        _source_kind,
        custom_error_type="source_kind",
        custom_error_message="a source must have exactly one of function, model, urls and judge_urls",
    ),
]


def broken_source_rules(
    key: str, sources: Sequence[RewardSource], *, others: Sequence[RewardSource] = ()
) -> Iterator[str]:
    if not sources:
        yield f"{key} is empty, so nothing could be learned; name at least one [[{key}]]"
    names = [source.name for source in (*sources, *others)]
    if len(set(names)) < len(names):
        yield f"{key} must have different names, not {names}; rename one"
    for source in (*sources, *others):
        if isinstance(source, ServiceConfig):
            yield from (f"reward source {source.name}: {fault}" for fault in _broken_service_rules(source))
        if isinstance(source, ModelSourceConfig) and source.max_batch_tokens < source.max_tokens:
            yield (
                f"reward source {source.name}: max_batch_tokens ({source.max_batch_tokens}) must hold the longest "
                f"sequence, max_tokens ({source.max_tokens}); raise the first or lower the second"
            )


def _broken_service_rules(source: ServiceConfig) -> Iterator[str]:
    for url in source.addresses:
        try:
            parts = urlsplit(url)
            known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            known = False
        if not known or not url.isprintable():
            yield f"{_without_secrets(url)!r} in urls must begin with http:// or https://"
        elif parts.username is not None or parts.password is not None:
            yield (
                f"the address {_without_secrets(url)} has a user name or password in it, which the journal would show; "
                f"remove it, and set {_HEADERS}"
            )
        elif secret := [key for key, _ in parse_qsl(parts.query) if _SECRET.search(key)]:
            yield (
                f"the address {_without_secrets(url)} has {secret[0]} in it, which the config would show; remove it, "
                f"and set {_HEADERS}"
            )
    for name, value in source.headers.items():
        if not _HEADER.fullmatch(name):
            yield f"{name[:80]!r} is no name of a header; it has letters, digits and - only"
        elif VARIABLE.fullmatch(value):
            continue
        elif "env:" in value:
            yield f'headers.{name} must be of the form "env:JUDGE_KEY" or "Bearer env:JUDGE_KEY"'
        elif _SECRET.search(name) or not (value.isascii() and value.isprintable()):
            yield (
                f"headers.{name} must not be written in the config; put its value into an environment variable, and "
                f'set headers.{name} = "env:NAME_OF_THE_VARIABLE"'
            )
    if isinstance(source, JudgeSourceConfig):
        yield from _broken_judge_rules(source)


def _broken_judge_rules(source: JudgeSourceConfig) -> Iterator[str]:
    if "{response}" not in source.template:
        yield "template must have {response} in it, or the judge does not see what it is to score"
    low, high = source.score_range
    if not low < high:
        yield f"score_range must be [lowest, highest], not [{low:g}, {high:g}]"
    try:
        groups = re.compile(source.score_pattern).groups
    except re.error as error:
        yield f"score_pattern is no regular expression ({error})"
    else:
        if not groups:
            yield "score_pattern must have a group, in parentheses, that matches the number"
    if own := sorted({"model", "messages", "stream", "n"} & source.request.keys()):
        yield f"request must not have {own[0]}, which Ratchet sets itself; remove it"


def _without_secrets(url: str) -> str:
    """Without user, password and query."""
    scheme, separator, rest = url.partition("://")
    host = re.split(r"[?#]", rest)[0].rpartition("@")[2]
    return f"{scheme}{separator}{host}" if separator else re.split(r"[?#]", url)[0].rpartition("@")[2]
