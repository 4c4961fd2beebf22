"""The configuration: its sections with their keys, types and defaults, and the checks of what fits together.

The sections about models are in `models`, and the ones about the processes themselves in `operation`.

`make docs` writes the text below a field into docs/reference/settings.md. A `ClassVar` is not a setting: it is a
constant of the section, with the reason why nobody has to set it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    SecretStr,
    field_serializer,
    field_validator,
    model_validator,
)

from hemostat.config.fields import (
    CandidateUrl,
    ExistingFile,
    ExistingFolder,
    Fraction,
    Mode,
    ModelName,
    Section,
    header_name,
    is_loopback,
)
from hemostat.config.models import ModelReference, Reasoning, Reference, Upstream
from hemostat.config.operation import (
    Admin,
    ClientLimits,
    ControlSettings,
    Limits,
    Listen,
    Log,
    SpoolSettings,
    Tracing,
)
from hemostat.config.store_url import split_store_url
from hemostat.config.text import short_repr
from hemostat_calibration.messages import shown_address

MAX_LABELS = 32
_LABEL = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Shadow(Section):
    """The choice of the requests that are measured, and the limits of what that may cost."""

    rate: float = Field(default=0.05, ge=0, le=1)
    """The largest fraction of the requests that is sampled. They are drawn at random, and no client can influence
    which ones. Relays sample less if the reference cannot score as many."""
    allow_on: bool = False
    """If it is true, clients may have a request sampled with `X-Hemostat-Shadow: on`."""
    max_queue: ClassVar[int] = 256
    """The number of captures that may wait for the reference. A longer queue would only make figures older: captures
    beyond what the reference can score on average are dropped in any case."""
    max_tokens: int = Field(default=4096, ge=2, le=1_000_000)
    """The largest number of tokens, prompt and output together, that is scored. Longer requests are skipped."""
    max_scored_tokens: int | None = Field(default=None, ge=16, le=1_000_000)
    """The number of last tokens that are scored of a longer output. They count only by position, context and phase.
    The reference still reads the tokens before them. With none, whole outputs are scored."""
    reference_tokens_per_second: float = Field(default=0.0, ge=0)
    """The token budget of the reference, prompts included. 0 means no limit."""
    top_k: int = Field(default=20, ge=2, le=1000)
    """The number of logprobs that vLLM is asked for at each position. It is at most the server's `--max-logprobs`. A
    list of one id would give biased estimates, because its last place is for an emitted token that is not among the
    likeliest ones."""
    floor_fraction: float = Field(default=0.02, ge=0, le=1)
    """The fraction of the scored requests that each model also scores against itself, which measures the noise floor.
    Each of them costs the compressed model's server a prefill of its tokens. With 0 the server prefills none of them,
    and also none of the responses that can name only ids."""


class Calibration(Section):
    """Learning and serving of decoding profiles."""

    mode: Mode = "observe"
    """With off, nothing is learned. With observe, Hemostat learns, judges, and reports which profile would serve. With
    auto, it also serves profiles that are proven."""
    control_fraction: Fraction = 0.1
    """The fraction of the conversations that never gets a profile: the control arm."""
    held_out_fraction: Fraction = 0.3
    """The fraction of the prompts that judges profiles. No profile is learned from them."""
    clamp_nats: float = Field(default=1.0, gt=0, le=20)
    """The largest change of a logit. A smaller one allows less gain, and needs fewer held-out requests to prove it."""
    clamp_kl_nats: ClassVar[float] = 2.0
    """The largest KL divergence from identity that a contextual profile may cause in the distribution of one token, to
    second order. If `clamp_nats` is 2 or less, that limit is reached first."""
    alpha: Fraction = 0.05
    """The probability that a profile that does not help is ever promoted, over the lifetime of the store."""
    min_tokens: int = Field(default=20_000, ge=1)
    """The number of tokens that are learned from before a profile is proposed."""
    anchors: int = Field(default=512, ge=8, le=4096)
    """The number of ids whose logits a contextual profile reads. With at least 16 more than the width of the hidden
    state, the compressed model's whole distribution is recovered from them."""
    rank: ClassVar[int] = 192
    """The largest rank of a contextual profile. Its size is about 2 bytes × rank × vocabulary. A smaller rank is
    chosen if it does better. Rank 256 gained 0.1 points more than rank 192."""
    half_life_tokens: ClassVar[float | None] = 2_000_000
    """The number of learned tokens after which a token has half its weight. None means no decay. This is a hundred
    times the number of tokens that the first profile is learned from: slow changes are followed, and nothing is
    forgotten before it is used."""
    recent_tokens: ClassVar[int] = 65_536
    """The number of the most recent tokens that are kept in memory, for fits that need more than sums. Each takes 2
    bytes × (anchors + width of the hidden state), which is 0.6 GB at a width of 4,096."""
    stored_learner_mib: ClassVar[int] = 64
    """The largest part of the store, in MiB, for what the contextual learner knows. It continues from this after a
    restart: first from its sums, which fit up to a width of 4,096, then from as many of its newest tokens as fit."""
    treat_unjudged: bool = False
    """If it is true, requests that cannot be scored may get a profile, too. Nothing would show if the profile harmed
    them."""
    model: ModelName | None = None
    """The served base model that profiles are learned and served for. All other models are only measured. With none,
    it is the first model that is matched with its reference."""


class Evidence(Section):
    """The rules for what counts as evidence for and against a profile."""

    client_header: Annotated[str, AfterValidator(header_name)] = "authorization"
    """The header that names a client. Choose one that clients cannot set freely: the API key, if something checks it,
    or a header that a gateway adds. If a test has four clients or more, each contributes at most a quarter of it."""
    kinds: int = Field(default=24, ge=1, le=100)
    """The number of kinds of traffic that have evidence and a profile of their own. All other kinds are pooled as
    `rest`."""
    cycle_hours: float = Field(default=24.0, ge=0.0, le=24.0 * 14)
    """The length of the cycle of the traffic, such as day and night. Until this much time has been measured, Hemostat
    does not know how much requests depend on each other: no baseline of the alarm is complete, and figures have an
    interval for the measured hours only. Nothing is promoted before two cycles, nor in a test that is shorter than a
    cycle. Use 0 for a trial with prompts in random order."""
    client_share: ClassVar[float] = 0.25
    """The largest part of a test's units that one client may contribute, if at least four clients contribute. None of
    four clients can then have more than its part."""

    @property
    def cycle_seconds(self) -> float:
        return 3600.0 * self.cycle_hours


class Adapter(Section):
    """Adapters that compensate the weights' error (family `adapter`). They are learned live, and vLLM serves them as
    LoRA."""

    enabled: bool = False
    """If it is true, adapters are learned and served."""
    compressed: Path | None = None
    """The checkpoint folder of the compressed model. With none, it is the path that the upstream names, provided that
    it exists on this machine."""
    rank: int = Field(default=16, ge=1, le=512)
    """The rank of every layer. With `shared_out` it is the rank whose bytes are distributed."""
    shared_out: bool = False
    """If it is true, the bytes are distributed to the layers that gain most, up to 4 times `rank` in one layer (vLLM's
    `--max-lora-rank`)."""
    min_tokens: ClassVar[int] = 1_000
    """The number of tokens of text, prompts included, from which the first adapter is made. It recovers most of what
    an adapter from ten times as many tokens does, and better ones follow."""
    max_tokens: int = Field(default=16_000, ge=100, le=1_000_000)
    """The number of the newest tokens, prompts included, that are kept in memory for the next adapter."""
    memory_mib: int = Field(default=4_096, ge=64)
    """The memory limit, in MiB, of the process that makes an adapter."""
    distil: bool = False
    """If it is true, the adapter is trained further on the reference's distributions. The result is kept only if
    held-out texts improve."""
    device: str = Field(default="cpu", min_length=1)
    """The torch device of the process that makes an adapter, and of the copies of the models that judge adapters."""
    folder: Path | None = None
    """A shared folder from which vLLM loads adapters, for engines without Hemostat's general plugin. It has the same
    path here and for vLLM."""


class StoreSettings(Section):
    """Where profiles, decisions and evidence are kept."""

    url: str = Field(default="memory://", repr=False)
    """The address of the store: `memory://`, `sqlite:///path/hemostat.db`, or
    `postgresql://user:password@host:5432/database` with libpq's options such as `?sslmode=verify-full`."""
    url_file: ExistingFile | None = None
    """A file that contains the address and nothing else, in place of `url`. It is read at the start and at SIGHUP."""

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        split_store_url(value)
        return value

    @field_serializer("url")
    def _without_password(self, value: str) -> str:
        return shown_address(value)


class Records(Section):
    """Scored requests as JSON lines."""

    path: Path | None = None
    """The file that scored requests are written to. **Token ids are text**, so none is written by default. If the disk
    is full, records are lost and counted, and no half lines are left. Writing is tried again after 1 s, then up to 60
    s."""


class Gate(Section):
    """The live gate, which says if a candidate may replace what serves: docs/gate.md#live."""

    candidate: CandidateUrl | None = None
    """The vLLM server of a candidate: `http(s)://host:port`, with `#NAME` if it serves several models. The API key of
    the upstream is sent to it, and not to a candidate that the API names. With none, a gate begins by
    `POST /api/v1/gate` only."""
    expect: Literal["same", "other"] = "other"
    """With other, the candidate has to be at least as near to the reference as the model that serves. With same, it
    has to be the same model; then the engines that serve also score the tokens of the requests that are compared."""
    own_answers: float = Field(default=0.2, ge=0, le=1)
    """The fraction of the compared requests whose prompts the candidate also answers by itself. Without any, there is
    no verdict."""
    tokens_per_hour: int = Field(default=500_000, ge=1_000)
    """The budget of the candidate: the largest number of tokens that it reads and writes in an hour."""


class Alarm(Section):
    """The conditions under which the alarm fires."""

    budget_nats: float | None = Field(default=None, gt=0, lt=5)
    """The allowed KL(reference‖compressed) above the noise floor, in nats per token. With none there is no budget
    test."""
    alpha: Fraction = 0.01
    """The probability of a false alarm in a week, over all kinds of traffic and both tests."""
    baseline_requests: int | None = Field(default=150, ge=30, le=10_000)
    """The number of the first requests of each kind of traffic that are its baseline for the change test. It takes
    more if they depend on each other. With a smaller baseline, more requests are needed to prove a change. With none
    there is no change test."""
    tolerance: ClassVar[float] = 1.25
    """The factor by which the differences of the logits of a kind may grow or shrink without being a change. Different
    traffic within a kind causes as much, and another scheme of quantization causes more (`make bench-guard`)."""
    clear_after: ClassVar[int] = 30
    """The number of consecutive requests without evidence of the change after which an alarm clears. It is the size of
    the smallest baseline."""
    engine_alpha: ClassVar[float] = 0.01
    """The probability that an engine is ever named an outlier although it is none, in addition to `alpha` and of the
    same size."""


class Canaries(Section):
    """The same token sequences are scored on every engine again, each hour: docs/engines.md#canaries."""

    enabled: bool = True
    """If it is true, canaries are replayed. A replay costs an engine about 4,700 tokens of prompts, one sequence at a
    time, in moments of low load."""
    file: ExistingFile | None = None
    """A file with prompts that replace Hemostat's own: 16 to 100 of them, one per line, as text or {"prompt": "..."}.
    """
    tolerance_nats: float = Field(default=0.01, gt=0, lt=5)
    """The distance of a sequence that is not a change yet. The distance is the mean |difference of log-probabilities|
    of its tokens. Choose a larger one for engines on different GPUs."""
    weights: bool = False
    """If it is true, checksums of an engine's weights are computed once a day, and when canaries state a change, in a
    moment without requests. The engine stands still meanwhile, and requests that come then wait: about a second for
    each 1 to 2 GB of weights."""


class Settings(Section):
    """The configuration of `hemostat serve`, `relay` and `control`. Only `upstream.url` (or `urls`) has no default."""

    listen: Listen = Listen()
    admin: Admin = Admin()
    upstream: Upstream
    control: ControlSettings = ControlSettings()
    reference: Reference = Reference()
    reasoning: Reasoning = Reasoning()
    shadow: Shadow = Shadow()
    calibration: Calibration = Calibration()
    evidence: Evidence = Evidence()
    adapter: Adapter = Adapter()
    labels: list[str] = Field(default=[], max_length=MAX_LABELS)
    """The values that the header `X-Hemostat-Label` may have. Figures are also given by label."""
    store: StoreSettings = StoreSettings()
    records: Records = Records()
    spool: SpoolSettings = SpoolSettings()
    workers: int = Field(default=1, ge=1, le=256)
    """The number of relay processes that serve. One more waits to replace a process that ends."""
    shutdown_seconds: float = Field(default=30.0, ge=0, le=3600)
    """The longest time that requests in progress get to end after SIGTERM."""
    drain_seconds: ClassVar[float] = 600.0
    """The longest time that requests in progress get to end in relays that were replaced by a reload or an upgrade.
    Clients of the OpenAI API wait no longer for an answer by default, and such a relay costs nothing but its memory."""
    run_dir: ExistingFolder | None = None
    """A folder for Unix sockets, which only Hemostat's user may write to. A `hemostat serve` that is started with the
    folder of a running one takes its place. With none it is a temporary folder."""
    limits: Limits = Limits()
    client_limits: ClientLimits = ClientLimits()
    alarm: Alarm = Alarm()
    canaries: Canaries = Canaries()
    gate: Gate = Gate()
    log: Log = Log()
    tracing: Tracing = Tracing()

    @field_validator("labels")
    @classmethod
    def _label_names(cls, value: list[str]) -> list[str]:
        for label in value:
            if not _LABEL.fullmatch(label):
                raise ValueError(f"{short_repr(label)} is not a label; use at most 64 letters, digits, _ . -")
        if len(set(value)) < len(value):
            raise ValueError("a label is listed twice")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Settings:
        if self.admin.token is None and not is_loopback(self.admin.host):
            raise ValueError(
                f"admin.token: required, as admin.host {self.admin.host} is not loopback; set it, or host: 127.0.0.1"
            )
        if self.admin.engine_token is not None and self.admin.engine_token == self.admin.token:
            raise ValueError("admin.engine_token: is admin.token, too; engines need a token of their own")
        if self.admin.metrics_need_token and self.admin.token is None:
            raise ValueError("admin.metrics_need_token: requires a token; set admin.token")
        if self.listen.port == self.admin.port != 0:
            raise ValueError(f"admin.port: {self.admin.port} is listen.port too; choose another")
        self._check_reference()
        self._check_spool()
        return self

    def _check_reference(self) -> None:
        reference, models = self.reference, self.reference.models
        if reference.backend == "transformers" and reference.model is None and not models:
            raise ValueError("reference.model: required with reference.backend: transformers; a folder or a hub name")
        if reference.backend == "vllm" and reference.url is None and (not models or _lacks_url(models)):
            of = f"reference.models.{_lacks_url(models)}.url or " if models else ""
            raise ValueError(f"{of}reference.url: required with reference.backend: vllm, like http://127.0.0.1:8001")
        wanted = self.calibration.model
        if not models:
            return
        if reference.backend == "none":
            raise ValueError("reference.models: has no effect with reference.backend: none; set vllm or transformers")
        if reference.model is not None:
            raise ValueError("reference.model: does not go with reference.models; name the first model there too")
        for name, model in models.items():
            if model.url is not None and reference.backend != "vllm":
                raise ValueError(f"reference.models.{name}.url: only with reference.backend: vllm; leave it out")
            if model.folder is not None and reference.backend != "vllm":
                raise ValueError(f"reference.models.{name}.folder: only with reference.backend: vllm; leave it out")
        if wanted is not None and wanted not in models:
            raise ValueError(
                f"calibration.model: {short_repr(wanted)} has no reference; add it to reference.models, or name one of "
                + ", ".join(models)
            )

    def _check_spool(self) -> None:
        score = self.spool.score
        if score != "now" and self.calibration.mode != "off":
            raise ValueError(
                f"calibration.mode: must be off with spool.score: {score}, as nothing is treated by evidence that came "
                "later; set one of them"
            )
        if self.spool.window is not None and self.reference.backend == "none":
            raise ValueError(f"spool.score: {score} requires a reference; set reference.backend, or score: never")

    def plain(self) -> dict[str, Any]:
        """Returns the settings JSON-ready, with the secrets in clear, for Hemostat's own processes only.
        `model_validate` is the inverse."""
        plain: dict[str, Any] = _with_secrets(self)
        return plain

    def redacted(self) -> dict[str, Any]:
        """Returns the settings JSON-ready, with masked secrets, for output."""
        return self.model_dump(mode="json")


def _lacks_url(models: Mapping[str, ModelReference]) -> str:
    """Returns the first name whose reference has no address of its own, or "" if all have one."""
    return next((name for name, model in models.items() if model.url is None), "")


def _with_secrets(value: object) -> Any:
    match value:
        case dict():
            return {name: _with_secrets(item) for name, item in value.items()}
        case BaseModel():
            return {name: _with_secrets(getattr(value, name)) for name in type(value).model_fields}
        case SecretStr():
            return value.get_secret_value()
        case Path():
            return str(value)
    return value


def section_at(key: Sequence[str | int]) -> type[Section]:
    """Returns the model at `key`, or the nearest one above it."""
    if tuple(key[:2]) == ("reference", "models") and len(key) > 2:
        return ModelReference
    section: type[Section] = Settings
    for part in key:
        field = section.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            break
        section = field.annotation
    return section


def _leaves(section: type[Section], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.annotation


LEAVES: dict[str, object] = dict(_leaves(Settings))
"""Every key that holds a value, with its type."""
SECTIONS = {leaf.partition(".")[0] for leaf in LEAVES if "." in leaf}
