"""The sections of the configuration: keys, types, defaults, and what must fit together.

A `ClassVar` is no setting: a constant of the section, with the reason why nobody has to set it.
"""

from __future__ import annotations

import importlib.metadata
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
    yaml_off,
)
from hemostat.config.reasoning_parsers import PARSERS
from hemostat.config.store_url import split_store_url
from hemostat.config.text import short_repr
from hemostat_calibration.messages import shown_address

MAX_LABELS = 32
MAX_ENGINES = 64
MAX_MODELS = 16
"""Served models with a reference of their own. With backend transformers each different one is a process and holds its
weights in memory, from when its model is first seen on the server."""

EXPORTER = "opentelemetry-exporter-otlp-proto-http"
"""The distribution that sends traces; it brings the rest of `hemostat[tracing]`."""

_LABEL = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Listen(Section):
    """The data port."""

    host: Host = "0.0.0.0"  # noqa: S104  the proxy is what clients talk to
    port: Port = 8080


class Admin(Section):
    """The admin port: metrics, health, console, JSON."""

    host: Host = "127.0.0.1"
    port: Port = 8081
    token: Secret | None = None
    token_file: ExistingFile | None = None
    """A file with the token alone, in place of `token`; read at the start and at SIGHUP."""
    engine_token: Secret | None = None
    """Of the plugin in vLLM, which can report and fetch profiles with it, and nothing else. None: it needs `token`."""
    engine_token_file: ExistingFile | None = None
    """A file with the engine token alone, in place of `engine_token`; read at the start and at SIGHUP."""
    metrics_need_token: bool = False
    """/metrics requires the token too."""
    allowed_hosts: list[Host] = Field(default=[], max_length=64)
    """Host names under which the port may be requested, besides addresses and localhost. Empty: on loopback none, else
    any."""

    @property
    def names(self) -> list[str] | None:
        """The accepted host names; None: all."""
        return self.allowed_hosts if self.allowed_hosts or is_loopback(self.host) else None


class Upstream(Section):
    """The vLLM server that runs the compressed model."""

    url: EnginesUrl | None = None
    """http(s)://host:port, or dns+http(s)://name:port: an engine at each address of the name."""
    urls: list[ServerUrl] = Field(default=[], max_length=MAX_ENGINES)
    """In place of `url`: several engines that serve the same models, http or https all of them."""
    api_key: Secret | None = None
    """Sent where the client sends no Authorization of its own, and by Hemostat's own probes."""
    api_key_file: ExistingFile | None = None
    """A file with the key alone, in place of `api_key`; read at the start and at SIGHUP."""
    max_connections: int = Field(default=512, ge=1, le=65536)
    """Of each relay process, to each engine."""
    affinity: bool = True
    """Requests of one conversation go to one engine, whose prefix cache has its beginning."""
    ca: ExistingFile | None = None
    """PEM file of the authority that signed the upstream's certificate."""
    openai_sampling_defaults: bool = False
    """True when vLLM was started with `--generation-config vllm`, or the model's generation_config sets no sampling
    parameter. Otherwise what a request is sampled with is known only where it says so itself (or is greedy), and the
    rest is not used where the tokens' distribution has to be known."""
    allow_adapter_routes: bool = False
    """Relay requests that load and unload LoRA adapters at the server (/v1/load_lora_adapter, /v1/unload_lora_adapter,
    /adapters); otherwise they are answered with 403. Adapters that Hemostat serves need these routes to exist."""

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
    """The reference of one served model; a text alone is its `model`."""

    model: str = Field(min_length=1)
    """As `reference.model`."""
    url: ServerUrl | None = None
    """vllm: another server than `reference.url`. `reference.api_key` is sent to it too."""
    device: Device | None = None
    """Another device than `reference.device`."""
    folder: Path | None = None
    """vllm: another folder than `reference.folder`."""


class Reference(Section):
    """The uncompressed models."""

    backend: Backend = "none"
    model: str | None = Field(default=None, min_length=1)
    """The reference of the upstream's first base model. transformers: a folder or a hub name. vllm: the served name
    (default: the server's first)."""
    models: dict[ModelName, Annotated[ModelReference, BeforeValidator(text_is_model)]] = Field(
        default={}, max_length=MAX_MODELS
    )
    """In place of `model`: served name -> reference. A base model that is not named is neither scored nor treated."""
    url: ServerUrl | None = None
    api_key: Secret | None = None
    api_key_file: ExistingFile | None = None
    """A file with the key alone, in place of `api_key`; read at the start and at SIGHUP."""
    folder: Path | None = None
    """vllm: folder of the reference's checkpoint (config.json and safetensors), of which only the output embedding is
    read, or a hub cache that has it. A pooling server's hidden states need it (default: the path that the server names,
    where it exists here). It may be written after the start: the server may still be loading it."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: Device = "cpu"
    """transformers: of the model. vllm: of the products of hidden states with the output embedding."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of each process that computes for a reference (default: half of the cores)."""


class Reasoning(Section):
    """How the thinking of a reasoning model is recognized: by the ids of the markers around it."""

    parser: str = "auto"
    """vLLM's `--reasoning-parser`, whose markers the server's tokenizer turns into ids. auto: markers that are single
    tokens of the vocabulary. none: thinking is not distinguished."""
    start: list[TokenId] = Field(default=[], max_length=32)
    """Ids of the start marker, in place of those that are found."""
    end: list[TokenId] = Field(default=[], max_length=32)

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
    allow_on: bool = False
    """Clients may force a request into the shadow with `X-Hemostat-Shadow: on`."""
    max_queue: ClassVar[int] = 256
    """Captures that may wait for the reference. A longer queue only makes figures older: what the reference cannot
    score on average is dropped in any case."""
    max_tokens: int = Field(default=4096, ge=2, le=1_000_000)
    """Longest prompt + output that is scored."""
    max_scored_tokens: int | None = Field(default=None, ge=16, le=1_000_000)
    """Of a longer output only the last so many tokens are scored, and count only by position, context and phase; the
    tokens before them are read by the reference all the same. none: whole outputs."""
    reference_tokens_per_second: float = Field(default=0.0, ge=0)
    """0: as fast as the reference can."""
    top_k: int = Field(default=20, ge=2, le=1000)
    """Must not exceed the server's --max-logprobs. At least 2: the last place is for an emitted token that is not among
    the likeliest, so a list of one depends on what was sampled, and estimates from it are biased."""
    floor_fraction: float = Field(default=0.02, ge=0, le=1)
    """Fraction of the scored requests that each model also scores against itself: the noise floor. Each costs the
    compressed model's server a prefill of their tokens."""


class Calibration(Section):
    """Learning and serving of decoding profiles."""

    mode: Mode = "observe"
    control_fraction: Fraction = 0.1
    held_out_fraction: Fraction = 0.3
    scope: Literal["pooled", "label", "route", "model"] = "pooled"
    """What is also learned separately: profiles for a label, a route or a model, tested in its kinds of traffic."""
    clamp_nats: float = Field(default=1.0, gt=0, le=20)
    """Largest change of a logit. A smaller one needs fewer held-out requests to prove a profile's gain."""
    clamp_kl_nats: ClassVar[float] = 2.0
    """Largest KL divergence from identity that a profile may cause in one token's distribution (to second order, for a
    contextual profile): with `clamp_nats` of 2 or less, that binds first."""
    alpha: Fraction = 0.05
    """Error probability of the promotion and rollback bounds."""
    min_tokens: int = Field(default=20_000, ge=1)
    """Scored tokens before a profile is proposed."""
    anchors: int = Field(default=512, ge=8, le=4096)
    """Ids whose logits a contextual profile reads."""
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
    treat_unjudged: bool = False
    """Requests that cannot be scored (structured output, several choices, …) may get a profile too, though nothing
    would show that it harms them."""
    model: ModelName | None = None
    """The served base model that profiles are learned and served for (default: the first one that is matched with its
    reference). All others are only measured."""
    force: ExistingFile | None = None
    """A profile that is applied to every request, without evidence: for tests."""


class Evidence(Section):
    """What counts as evidence for and against a profile."""

    client_header: Annotated[str, AfterValidator(header_name)] = "authorization"
    """The header that names a client. It must be one that clients cannot choose freely."""
    kinds: int = Field(default=24, ge=1, le=100)
    """Kinds of traffic that are followed by themselves; all others are pooled as `rest`."""
    cycle_hours: float = Field(default=24.0, ge=0.0, le=24.0 * 14)
    """Length of the cycle that traffic goes through, such as day and night. Before so long a time was seen, nothing is
    promoted, baselines of the alarm are not complete, and figures have an interval of the hours so far only: how much
    requests depend on each other is not known yet. 0 where there is none, as in a trial with prompts in random
    order."""
    client_share: ClassVar[float] = 0.25
    """Largest part of a test's units that one client may contribute, where at least four clients do: none of four can
    then have more than its part."""

    @property
    def cycle_seconds(self) -> float:
        return 3600.0 * self.cycle_hours


class Adapter(Section):
    """Adapters that compensate the weights' error (family `adapter`): learned live, served by vLLM as LoRA."""

    enabled: bool = False
    reference: Path | None = None
    """Checkpoint folder of the uncompressed model; default: `reference.model`, where that is a folder."""
    compressed: Path | None = None
    """Checkpoint folder of the compressed model; default: the path that the upstream names, where it exists here."""
    rank: int = Field(default=16, ge=1, le=512)
    """Of every layer; with `shared_out`, on average by bytes."""
    shared_out: bool = False
    """Give the bytes to the layers where they gain most, in place of the same rank to each."""
    min_tokens: ClassVar[int] = 2_000
    """Tokens of text, prompts included, from which the first adapter is made: it recovers most of what one from ten
    times as many does, and better ones follow."""
    max_tokens: int = Field(default=16_000, ge=100, le=1_000_000)
    """Newest tokens that are kept, in memory, for the next adapter."""
    memory_mib: int = Field(default=4_096, ge=64)
    """Of the process that makes an adapter."""
    distil: bool = False
    """Train the adapter further on the reference's distributions; kept only where held-out texts improve."""
    device: str = Field(default="cpu", min_length=1)
    """Of the copies and of the process that makes an adapter: a torch device."""
    folder: Path | None = None
    """Shared folder for engines without Hemostat's general plugin, at the same path for vLLM; adapters are loaded from
    it by their path."""


class StoreSettings(Section):
    """Where profiles and decisions are kept."""

    url: str = Field(default="memory://", repr=False)
    """Contains the server's password, where it has one."""
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
    """Off by default: a record contains token ids, from which the text can be decoded."""


class Limits(Section):
    """What clients may send, and how much of a relay process they may use."""

    buffered_bytes: int = Field(default=128 * 1024 * 1024, ge=1024 * 1024)
    """Of all heads, bodies and waiting requests of a relay process. Beyond it requests of the client that holds most
    are answered with 503."""
    connections: int = Field(default=16_384, ge=1, le=65_536)
    """Of all clients of a relay process, as far as its limit of open files allows. Beyond it the connections of
    the address that has most are closed, those first that have been idle for longest, or else a new one is answered
    with 503."""
    connections_per_client: int = Field(default=8_192, ge=1, le=65_536)
    """The same, of one address (IPv6: of one /64 network). Clients behind a proxy share its address."""


class Log(Section):
    """Standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"
    requests: bool = False
    """One line for each relayed generation: ids and outcomes, never prompts or texts."""
    access: Annotated[str, BeforeValidator(yaml_off)] = "off"
    """off, stdout or a path: one line for each request on the data port, refused ones too; in the form of `format`."""
    access_clients: bool = False
    """The access log has the clients' addresses."""

    @field_validator("access")
    @classmethod
    def _off_or_path(cls, value: str) -> str:
        if value not in {"off", "stdout"} and not value.startswith("/"):
            raise ValueError(f"{short_repr(value)} is none of off, stdout and a path like /var/log/hemostat/access.log")
        return value

    @field_validator("level", mode="before")
    @classmethod
    def _any_case(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value


class Alarm(Section):
    """When the alarm fires."""

    budget_nats: float | None = Field(default=None, gt=0, lt=5)
    """Allowed KL(reference‖compressed) above the noise floor, nats per token; none: no budget test."""
    alpha: Fraction = 0.01
    """Probability of any false alarm, over all kinds of traffic, both tests and the whole run."""
    baseline_requests: int | None = Field(default=150, ge=30, le=10_000)
    """Requests of each kind of traffic that are its baseline for the change test; none: no change test."""
    tolerance: ClassVar[float] = 1.25
    """Factor by which the differences of the logits of a kind may grow or shrink without being a change: what different
    traffic within a kind causes, less than what another scheme of quantization does (`make bench-guard`)."""
    clear_after: ClassVar[int] = 30
    """Consecutive requests without evidence of the change after which an alarm clears: the smallest baseline."""
    engine_alpha: ClassVar[float] = 0.01
    """Probability that any engine is ever named as not like the others though it is, beside `alpha`: the same."""


class Tracing(Section):
    """OpenTelemetry; needs the extra `hemostat[tracing]`."""

    endpoint: ServerUrl | None = None
    """An OTLP/HTTP receiver, like http://collector:4318; none: no traces."""
    ratio: float = Field(default=0.05, ge=0, le=1)
    """Fraction of the traces that begin here that are sampled; a client's own decision is kept."""

    @field_validator("endpoint")
    @classmethod
    def _installed(cls, value: str | None) -> str | None:
        # Another package may have installed its API alone.
        if value is not None and not any(importlib.metadata.distributions(name=EXPORTER)):
            raise ValueError("needs OpenTelemetry: pip install 'hemostat[tracing]'")
        return value


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
    store: StoreSettings = StoreSettings()
    records: Records = Records()
    workers: int = Field(default=1, ge=1, le=256)
    shutdown_seconds: float = Field(default=30.0, ge=0, le=3600)
    """Longest drain after SIGTERM."""
    drain_seconds: float = Field(default=600.0, ge=0, le=86400)
    """Longest drain of relays that were replaced, by a reload or an upgrade."""
    run_dir: ExistingFolder | None = None
    """Folder for Unix sockets, of this user only. A `hemostat serve` that is started with the folder of a running one
    takes its place. none: a temporary folder."""
    limits: Limits = Limits()
    client_limits: ClientLimits = ClientLimits()
    alarm: Alarm = Alarm()
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
        for name, one in models.items():
            if one.url is not None and reference.backend != "vllm":
                raise ValueError(f"reference.models.{name}.url: only with reference.backend: vllm; leave it out")
            if one.folder is not None and reference.backend != "vllm":
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
    return next((name for name, one in models.items() if one.url is None), "")


def _with_secrets(value: object) -> Any:
    match value:
        case dict():
            return {name: _with_secrets(one) for name, one in value.items()}
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
