"""The sections of the configuration: keys, types, defaults, and what must fit together.

The text below a field is that of docs/reference/settings.md, which `make docs` writes. A `ClassVar` is no setting: a
constant of the section, with the reason why it need not be set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SecretStr,
    field_serializer,
    field_validator,
    model_validator,
)

from hemostat.config.client_limits import ClientLimits
from hemostat.config.control import ControlSettings
from hemostat.config.fields import (
    Backend,
    Device,
    EnginesUrl,
    ExistingFile,
    ExistingFolder,
    Fraction,
    Host,
    Mode,
    ModelName,
    Port,
    Secret,
    Section,
    ServerUrl,
    TokenId,
    header_name,
    is_loopback,
    text_is_model,
)
from hemostat.config.observability import Log, Tracing
from hemostat.config.reasoning_parsers import PARSERS
from hemostat.config.store_url import split_store_url
from hemostat.config.text import short_repr
from hemostat_calibration.messages import shown_address

MAX_LABELS = 32
MAX_ENGINES = 64
MAX_MODELS = 16
"""Served models with a reference of their own. With backend transformers each different one is a process and holds its
weights in memory, from when its model is first seen on the server."""

_LABEL = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Listen(Section):
    """The data port, which clients use."""

    host: Host = "0.0.0.0"  # noqa: S104  the proxy is what clients talk to
    """Address that it listens on."""
    port: Port = 8080
    """Its TCP port; 0: any free one."""


class Admin(Section):
    """The admin port: metrics, health, console, JSON."""

    host: Host = "127.0.0.1"
    """Address that it listens on. An address other than loopback requires `token`."""
    port: Port = 8081
    """Its TCP port; 0: any free one."""
    token: Secret | None = None
    """The admin token, which every request that changes state has to send. none: such requests are refused."""
    token_file: ExistingFile | None = None
    """A file with the token alone, in place of `token`; read at the start and at SIGHUP."""
    engine_token: Secret | None = None
    """The token of the plugin in vLLM, which can report and fetch profiles with it, and nothing else. none: the plugin
    needs `token`."""
    engine_token_file: ExistingFile | None = None
    """A file with the engine token alone, in place of `engine_token`; read at the start and at SIGHUP."""
    metrics_need_token: bool = False
    """`/metrics` requires the token, too."""
    allowed_hosts: list[Host] = Field(default=[], max_length=64)
    """Host names under which the port may be requested, besides IP addresses and localhost. Empty: on loopback no
    others (against DNS rebinding), elsewhere any."""

    @property
    def names(self) -> list[str] | None:
        """The accepted host names; None: all."""
        return self.allowed_hosts if self.allowed_hosts or is_loopback(self.host) else None


class Upstream(Section):
    """The vLLM server, or several engines, with the compressed model. Exactly one of `url` and `urls` is required."""

    url: EnginesUrl | None = None
    """`http(s)://host:port`, or `dns+http(s)://name:port`: an engine at each address of the name."""
    urls: list[ServerUrl] = Field(default=[], max_length=MAX_ENGINES)
    """In place of `url`: several engines that serve the same models, all by http or all by https."""
    api_key: Secret | None = None
    """API key that Hemostat sends for a client without an Authorization header, and with its own probes."""
    api_key_file: ExistingFile | None = None
    """A file with the key alone, in place of `api_key`; read at the start and at SIGHUP."""
    max_connections: int = Field(default=512, ge=1, le=65536)
    """Connections of each relay process to each engine."""
    affinity: bool = True
    """Requests of a conversation go to one engine, whose prefix cache has its beginning. false: the engine of a sampled
    request is drawn at random, and the outlier engine is tested for."""
    ca: ExistingFile | None = None
    """PEM file of the authority that signed the upstream's certificate."""
    openai_sampling_defaults: bool = False
    """Set it to true where vLLM runs with `--generation-config vllm`, or the model's generation_config.json sets no
    sampling parameter. Otherwise the sampling parameters of a request are known only where it sets them all, and other
    requests do not count for the estimate without truncation bias."""
    allow_adapter_routes: bool = False
    """Relay requests that load and unload LoRA adapters (`/v1/load_lora_adapter`, `/v1/unload_lora_adapter`,
    `/adapters`); otherwise they are answered with 403."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of the engines, as configured."""
        return (self.url,) if self.url is not None else tuple(self.urls)

    @property
    def servers(self) -> tuple[str, ...]:
        """The same for requests of Hemostat's own; a name that stands for several engines reaches any of them."""
        return tuple(address.removeprefix("dns+") for address in self.addresses)

    @property
    def resolves(self) -> bool:
        """The engines are the addresses of a name."""
        return self.url is not None and self.url.startswith("dns+")

    def at(self, server: str) -> Upstream:
        """The same with one of `servers` alone."""
        return self.model_copy(update={"url": server, "urls": []})

    @model_validator(mode="after")
    def _one_form(self) -> Upstream:
        if (self.url is None) == (not self.urls):
            raise ValueError("url or urls: give exactly one of them, like url: http://127.0.0.1:8000")
        if len(set(self.urls)) < len(self.urls):
            raise ValueError("urls: an address is listed twice")
        if len({url.partition(":")[0] for url in self.urls}) > 1:
            raise ValueError("urls: http and https do not go together; use one of them for all")
        return self


class ModelReference(Section):
    """The reference of one served model; a string alone is its `model`."""

    model: str = Field(min_length=1)
    """As `reference.model`."""
    url: ServerUrl | None = None
    """vllm: its server, in place of `reference.url`. `reference.api_key` is sent to it, too."""
    device: Device | None = None
    """Its device, in place of `reference.device`."""
    folder: Path | None = None
    """vllm: its folder, in place of `reference.folder`."""


class Reference(Section):
    """The uncompressed models."""

    backend: Backend = "none"
    """transformers: in a process of Hemostat's, over the full vocabulary. vllm: another server; full vocabulary if it
    is a pooling server, else lists of ids. none: nothing is measured, Hemostat is a relay only."""
    model: str | None = Field(default=None, min_length=1)
    """The reference of the upstream's first base model. transformers: a folder or a hub name, required. vllm: the
    served name (none: the server's first)."""
    models: dict[ModelName, Annotated[ModelReference, BeforeValidator(text_is_model)]] = Field(
        default={}, max_length=MAX_MODELS
    )
    """In place of `model`, for a server with several base models: served name → reference. A base model that is not
    named is neither scored nor treated."""
    url: ServerUrl | None = None
    """vllm: address of the reference's server, required."""
    api_key: Secret | None = None
    """vllm: API key that is sent to the reference's server."""
    api_key_file: ExistingFile | None = None
    """A file with the key alone, in place of `api_key`; read at the start and at SIGHUP."""
    folder: Path | None = None
    """vllm: folder of the reference's checkpoint (config.json and safetensors), or a hub cache that has it; only the
    output embedding is read. Hidden states of a pooling server need it. none: the path that the server names, where it
    exists on this machine. It may appear after the start."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """transformers: type of the weights; auto: that of the checkpoint."""
    device: Device = "cpu"
    """Torch device. transformers: of the model. vllm: of the products of hidden states with the output embedding."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of each process that computes for a reference. none: half of the cores."""


class Reasoning(Section):
    """How the thinking of a reasoning model is recognized: by the ids of its start and end markers."""

    parser: str = "auto"
    """vLLM's `--reasoning-parser`, whose markers the server's tokenizer turns into ids. auto: markers that are single
    tokens of the vocabulary. none: thinking is not distinguished. `hemostat check` prints the markers."""
    start: list[TokenId] = Field(default=[], max_length=32)
    """Ids of the start marker, in place of those of `parser`."""
    end: list[TokenId] = Field(default=[], max_length=32)
    """Ids of the end marker; required with `start`."""

    @field_validator("parser")
    @classmethod
    def _known_parser(cls, value: str) -> str:
        if value not in {"auto", "none", *PARSERS}:
            known = f"auto, none, {', '.join(PARSERS)}"
            raise ValueError(f"{short_repr(value)} is none of {known}; for another one set reasoning.start and end")
        return value

    @model_validator(mode="after")
    def _both(self) -> Reasoning:
        if self.start and not self.end:
            raise ValueError("end: required with reasoning.start; the ids of the end marker")
        return self


class Shadow(Section):
    """Which requests are measured, and the limits of what that may cost."""

    rate: float = Field(default=0.05, ge=0, le=1)
    """Largest fraction of the requests that is sampled, drawn at random. Relays sample less where the reference cannot
    score as many. No client can influence which ones."""
    allow_on: bool = False
    """Clients may have a request sampled with `X-Hemostat-Shadow: on`."""
    max_queue: ClassVar[int] = 256
    """Captures that may wait for the reference. A longer queue only makes figures older: what the reference cannot
    score on average is dropped in any case."""
    max_tokens: int = Field(default=4096, ge=2, le=1_000_000)
    """Longest prompt and output, together, that is scored; longer requests are skipped."""
    max_scored_tokens: int | None = Field(default=None, ge=16, le=1_000_000)
    """Of a longer output only this many last tokens are scored, and count only by position, context and phase; the
    reference still reads the tokens before them. none: whole outputs are scored."""
    reference_tokens_per_second: float = Field(default=0.0, ge=0)
    """Token budget of the reference, prompts included. 0: no limit."""
    top_k: int = Field(default=20, ge=2, le=1000)
    """Number of logprobs that vLLM is asked for at each position; at most its `--max-logprobs`. From a list of one id
    estimates would be biased, because its last place is for an emitted token that is not among the likeliest."""
    floor_fraction: float = Field(default=0.02, ge=0, le=1)
    """Fraction of the scored requests that each model also scores against itself, to measure the noise floor. Each
    costs the compressed model's server a prefill of its tokens. 0: it prefills none, nor those of which a response can
    name only the ids."""


class Calibration(Section):
    """Learning and serving of decoding profiles."""

    mode: Mode = "observe"
    """off. observe: learn, judge, and report which profile would serve. auto: also serve profiles that are proven."""
    control_fraction: Fraction = 0.1
    """Fraction of the conversations that never gets a profile: the control arm."""
    held_out_fraction: Fraction = 0.3
    """Fraction of the prompts that judges profiles and that none is learned from."""
    scope: Literal["pooled", "label", "route", "model"] = "pooled"
    """Learn profiles also for each label, route or model (a LoRA adapter is a model) separately, in addition to those
    of all traffic. What serves is decided by kind of traffic in any case."""
    clamp_nats: float = Field(default=1.0, gt=0, le=20)
    """Largest change of a logit. A smaller one allows less gain, and needs fewer held-out requests to prove it."""
    clamp_kl_nats: ClassVar[float] = 2.0
    """Largest KL divergence from identity that a profile may cause in one token's distribution (to second order, for a
    contextual profile): with `clamp_nats` of 2 or less, that binds first."""
    alpha: Fraction = 0.05
    """Probability of ever promoting a profile that does not help, over the lifetime of the store."""
    min_tokens: int = Field(default=20_000, ge=1)
    """Tokens that are learned from before a profile is proposed."""
    anchors: int = Field(default=512, ge=8, le=4096)
    """Number of ids whose logits a contextual profile reads. With at least 16 more than the hidden state is wide, the
    compressed model's whole distribution is recovered from them."""
    rank: ClassVar[int] = 192
    """Largest rank of a contextual profile, whose size is about 2 bytes × rank × vocabulary: a smaller one is chosen
    where it does better, and 256 gained 0.1 points more."""
    half_life_tokens: ClassVar[float | None] = 2_000_000
    """Number of learned tokens after which a token has half its weight; None: no decay. A hundred times what a profile
    is learned from at first: slow changes are followed, and nothing is forgotten before it is used."""
    recent_tokens: ClassVar[int] = 65_536
    """Number of the most recent tokens that are kept in memory, for fits that need more than sums; each takes 2 bytes ×
    (anchors + width of the hidden state): 0.6 GB at a width of 4,096."""
    stored_learner_mib: ClassVar[int] = 64
    """Most MiB of the store for what the contextual learner knows, from which it goes on after a restart: its sums,
    which fit up to a width of 4,096, then its newest tokens as far as they fit."""
    apply: Literal["engine", "request"] = "engine"
    """engine: by the plugin in vLLM. request: without the plugin, by `logit_bias` (and `temperature`, where the
    server's default is known to be 1), on requests in which the client sets neither."""
    treat_unjudged: bool = False
    """Requests that cannot be scored may get a profile, too, though nothing would show that it harms them."""
    model: ModelName | None = None
    """The served base model that profiles are learned and served for; all others are only measured. none: the first
    one that is matched with its reference."""
    force: ExistingFile | None = None
    """A profile's file that is applied to every request, without evidence: for tests."""


class Evidence(Section):
    """What counts as evidence for and against a profile."""

    client_header: Annotated[str, AfterValidator(header_name)] = "authorization"
    """The header that names a client. Choose one that clients cannot set freely: the API key where something checks it,
    or a header that a gateway adds. Where a test has four clients or more, each contributes at most a quarter of it."""
    kinds: int = Field(default=24, ge=1, le=100)
    """Number of kinds of traffic with evidence and a profile of their own; all other kinds are pooled as `rest`."""
    cycle_hours: float = Field(default=24.0, ge=0.0, le=24.0 * 14)
    """Length of the cycle of the traffic, such as day and night. Until this much time has been measured, it is not
    known how much requests depend on each other: no baseline of the alarm is complete, and figures have an interval of
    the hours measured so far only. Nothing is promoted before two cycles. 0 for a trial with prompts in random order.
    """
    client_share: ClassVar[float] = 0.25
    """Largest part of a test's units that one client may contribute, where at least four clients do: none of four can
    then have more than its part."""

    @property
    def cycle_seconds(self) -> float:
        return 3600.0 * self.cycle_hours


class Adapter(Section):
    """Adapters that compensate the weights' error (family `adapter`): learned live, served by vLLM as LoRA."""

    enabled: bool = False
    """Whether adapters are learned and served."""
    reference: Path | None = None
    """Checkpoint folder of the uncompressed model. none: `reference.model`, where that is a folder on this machine."""
    compressed: Path | None = None
    """Checkpoint folder of the compressed model. none: the path that the upstream names, where it exists on this
    machine."""
    rank: int = Field(default=16, ge=1, le=512)
    """Rank of every layer; with `shared_out`, the rank whose bytes are distributed."""
    shared_out: bool = False
    """Distribute the bytes to the layers where they gain most, up to 4 times `rank` (vLLM's `--max-lora-rank`)."""
    min_tokens: ClassVar[int] = 2_000
    """Tokens of text, prompts included, from which the first adapter is made: it recovers most of what one from ten
    times as many does, and better ones follow."""
    max_tokens: int = Field(default=16_000, ge=100, le=1_000_000)
    """Number of the newest tokens, prompts included, that are kept in memory for the next adapter."""
    memory_mib: int = Field(default=4_096, ge=64)
    """Memory limit of the process that makes an adapter, MiB."""
    distil: bool = False
    """Train the adapter further on the reference's distributions; kept only where held-out texts improve."""
    device: str = Field(default="cpu", min_length=1)
    """Torch device of the process that makes an adapter, and of the copies of the models that judge adapters."""
    folder: Path | None = None
    """For engines without Hemostat's general plugin: a shared folder, at the same path here and for vLLM, from which
    vLLM loads adapters."""


class StoreSettings(Section):
    """Where profiles, decisions and evidence are kept."""

    url: str = Field(default="memory://", repr=False)
    """`memory://`, `sqlite:///path/hemostat.db`, or `postgresql://user:password@host:5432/database` with libpq's
    options such as `?sslmode=verify-full`."""
    url_file: ExistingFile | None = None
    """A file with the address alone, in place of `url`; read at the start and at SIGHUP."""

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
    """The file. **Token ids are text**, so none is written by default. On a full disk records are lost and counted, and
    no half lines are left; writing is tried again after 1 s, then up to 60 s."""


class Limits(Section):
    """What clients may send, and how much of a relay process they may use."""

    buffered_bytes: int = Field(default=128 * 1024 * 1024, ge=1024 * 1024)
    """Memory of one relay process for heads and bodies, for requests that wait for a connection, and (up to a quarter
    of it) for copies that may have to be sent again. Beyond it requests of the client that holds most are answered with
    503."""
    connections: int = Field(default=16_384, ge=1, le=65_536)
    """Connections of all clients to one relay process. Beyond it, connections that wait for a complete request are
    closed: of the address that has most, the one that has waited longest; where there is none, a new connection gets
    503. It is lowered to what `ulimit -n` allows: half of that, or what `upstream.max_connections` leaves."""
    connections_per_client: int = Field(default=8_192, ge=1, le=65_536)
    """The same, of one address (IPv6: one /64 network). Behind a load balancer all clients have its address: set it to
    the value of `connections` there."""


class Alarm(Section):
    """When the alarm fires."""

    budget_nats: float | None = Field(default=None, gt=0, lt=5)
    """Allowed KL(reference‖compressed) above the noise floor, nats per token. none: no budget test."""
    alpha: Fraction = 0.01
    """Probability of a false alarm in a week, over all kinds of traffic and both tests."""
    baseline_requests: int | None = Field(default=150, ge=30, le=10_000)
    """Number of the first requests of each kind of traffic that are its baseline for the change test; more where they
    depend on each other. With fewer, more requests are needed to prove a change. none: no change test."""
    tolerance: ClassVar[float] = 1.25
    """Factor by which the differences of the logits of a kind may grow or shrink without being a change: what different
    traffic within a kind causes, less than what another scheme of quantization does (`make bench-guard`)."""
    clear_after: ClassVar[int] = 30
    """Consecutive requests without evidence of the change after which an alarm clears: the smallest baseline."""
    engine_alpha: ClassVar[float] = 0.01
    """Probability that an engine is ever named an outlier although it is none, in addition to `alpha`: the same."""


class Canaries(Section):
    """The same token sequences on every engine again, each hour: docs/engines.md#canaries."""

    enabled: bool = True
    """A replay costs an engine about 4,700 tokens of prompts, one sequence at a time, in moments of low load."""
    file: ExistingFile | None = None
    """Prompts in place of those that come with Hemostat: 16 to 100, one per line, as text or {"prompt": "..."}."""
    tolerance_nats: float = Field(default=0.01, gt=0, lt=5)
    """Distance of a sequence, the mean |difference of log-probabilities| of its tokens, that is no change: larger for
    engines on different GPUs."""


class Settings(Section):
    """The configuration of `hemostat serve`, `relay` and `control`; only `upstream.url` (or `urls`) has no default."""

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
    """Values that the header `X-Hemostat-Label` may have; figures are also given by label."""
    store: StoreSettings = StoreSettings()
    records: Records = Records()
    workers: int = Field(default=1, ge=1, le=256)
    """Number of relay processes that serve; one more waits to replace one that ends."""
    shutdown_seconds: float = Field(default=30.0, ge=0, le=3600)
    """Longest drain after SIGTERM."""
    drain_seconds: float = Field(default=600.0, ge=0, le=86400)
    """Longest drain of relays that were replaced, by a reload or an upgrade."""
    run_dir: ExistingFolder | None = None
    """Folder for Unix sockets, which only Hemostat's user may write to. A `hemostat serve` that is started with the
    folder of a running one takes its place. none: a temporary folder."""
    limits: Limits = Limits()
    client_limits: ClientLimits = ClientLimits()
    alarm: Alarm = Alarm()
    canaries: Canaries = Canaries()
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
        if self.calibration.scope == "label" and not self.labels:
            raise ValueError("labels: required with calibration.scope: label; list what X-Hemostat-Label may be")
        if self.calibration.scope != "pooled" and self.calibration.apply == "request":
            raise ValueError("calibration.scope: only pooled goes with calibration.apply: request")
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

    def plain(self) -> dict[str, Any]:
        """JSON-ready, with the secrets in clear: for Hemostat's own processes only. `model_validate` is the inverse."""
        plain: dict[str, Any] = _with_secrets(self)
        return plain

    def redacted(self) -> dict[str, Any]:
        """JSON-ready, with masked secrets: for output."""
        return self.model_dump(mode="json")


def _lacks_url(models: Mapping[str, ModelReference]) -> str:
    """The first name whose reference has no address of its own; "" when all have one."""
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
    """The model at `key`, or the nearest one above it."""
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
"""Every key that holds a value -> its type."""
SECTIONS = {leaf.partition(".")[0] for leaf in LEAVES if "." in leaf}
