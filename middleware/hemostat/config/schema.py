"""The sections of the configuration: their keys, types and defaults, and the checks of what fits together.

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
"""The largest number of served models with references of their own. With backend transformers each different reference
is a process. It holds its weights in memory from the moment when its model is first seen on the server."""

_LABEL = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Listen(Section):
    """The data port, which clients use."""

    host: Host = "0.0.0.0"  # noqa: S104  the proxy is what clients talk to
    """The address that the data port listens on."""
    port: Port = 8080
    """The TCP port. 0 takes any free one."""


class Admin(Section):
    """The admin port: metrics, health, console, JSON."""

    host: Host = "127.0.0.1"
    """The address that the admin port listens on. An address other than loopback requires `token`."""
    port: Port = 8081
    """The TCP port. 0 takes any free one."""
    token: Secret | None = None
    """The admin token. Every request that changes state has to send it. If it is none, such requests are refused."""
    token_file: ExistingFile | None = None
    """A file that contains the token and nothing else, in place of `token`. It is read at the start and at SIGHUP."""
    engine_token: Secret | None = None
    """The token of the plugin in vLLM. The plugin can report and fetch profiles with it, and do nothing else. If it is
    none, the plugin needs `token`."""
    engine_token_file: ExistingFile | None = None
    """A file that contains the engine token and nothing else, in place of `engine_token`. It is read at the start and
    at SIGHUP."""
    metrics_need_token: bool = False
    """If it is true, `/metrics` requires the admin token, too."""
    allowed_hosts: list[Host] = Field(default=[], max_length=64)
    """The host names under which the port may be requested, in addition to IP addresses and localhost. If the list is
    empty, no other name is accepted on loopback (against DNS rebinding), and any name elsewhere."""

    @property
    def names(self) -> list[str] | None:
        """The accepted host names. None means all."""
        return self.allowed_hosts if self.allowed_hosts or is_loopback(self.host) else None


class Upstream(Section):
    """The vLLM server, or several engines, with the compressed model. Exactly one of `url` and `urls` is required."""

    url: EnginesUrl | None = None
    """The address of the server: `http(s)://host:port`. With `dns+http(s)://name:port` there is an engine at each
    address of the name."""
    urls: list[ServerUrl] = Field(default=[], max_length=MAX_ENGINES)
    """The addresses of several engines that serve the same models, in place of `url`. All of them use http, or all of
    them https."""
    api_key: Secret | None = None
    """The API key that Hemostat sends with its own probes, and for a client that sends no Authorization header."""
    api_key_file: ExistingFile | None = None
    """A file that contains the key and nothing else, in place of `api_key`. It is read at the start and at SIGHUP."""
    max_connections: int = Field(default=512, ge=1, le=65536)
    """The largest number of connections from each relay process to each engine."""
    affinity: bool = True
    """If it is true, all requests of a conversation go to one engine, whose prefix cache has the beginning of the
    conversation. If it is false, the engine of a sampled request is drawn at random, and Hemostat tests whether one
    engine is an outlier."""
    ca: ExistingFile | None = None
    """A PEM file of the authority that signed the upstream's certificate."""
    openai_sampling_defaults: bool = False
    """Set this to true if vLLM runs with `--generation-config vllm`, or if the model's generation_config.json sets no
    sampling parameter. Otherwise Hemostat knows the sampling parameters of a request only if the request sets all of
    them. Other requests do not count for the estimate without truncation bias."""
    allow_adapter_routes: bool = False
    """If it is true, requests that load and unload LoRA adapters are relayed (`/v1/load_lora_adapter`,
    `/v1/unload_lora_adapter`, `/adapters`). Otherwise they are answered with 403."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses of the engines, as they are configured."""
        return (self.url,) if self.url is not None else tuple(self.urls)

    @property
    def servers(self) -> tuple[str, ...]:
        """The addresses for requests of Hemostat's own. A name that stands for several engines reaches any one of
        them."""
        return tuple(address.removeprefix("dns+") for address in self.addresses)

    @property
    def resolves(self) -> bool:
        """True if the engines are the addresses of a name."""
        return self.url is not None and self.url.startswith("dns+")

    def at(self, server: str) -> Upstream:
        """Returns the same section with one of `servers` alone."""
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
    """The reference of one served model. A string alone is its `model`."""

    model: str = Field(min_length=1)
    """The reference, as in `reference.model`."""
    url: ServerUrl | None = None
    """The server of this reference with backend vllm, in place of `reference.url`. `reference.api_key` is sent to it,
    too."""
    device: Device | None = None
    """The device of this reference, in place of `reference.device`."""
    folder: Path | None = None
    """The folder of this reference's checkpoint with backend vllm, in place of `reference.folder`."""


class Reference(Section):
    """The uncompressed models."""

    backend: Backend = "none"
    """The way in which the reference is computed. With transformers it runs in a process of Hemostat's and gives the
    full vocabulary. With vllm it is another server, which gives the full vocabulary if it is a pooling server, and
    lists of ids otherwise. With none nothing is measured, and Hemostat is a relay only."""
    model: str | None = Field(default=None, min_length=1)
    """The reference of the upstream's first base model. With transformers it is a folder or a hub name, and is
    required. With vllm it is the served name; none means the server's first one."""
    models: dict[ModelName, Annotated[ModelReference, BeforeValidator(text_is_model)]] = Field(
        default={}, max_length=MAX_MODELS
    )
    """The references of a server with several base models, in place of `model`: served name → reference. A base model
    that is not named is neither scored nor treated."""
    url: ServerUrl | None = None
    """The address of the reference's server, which backend vllm requires."""
    api_key: Secret | None = None
    """The API key that is sent to the reference's server with backend vllm."""
    api_key_file: ExistingFile | None = None
    """A file that contains the key and nothing else, in place of `api_key`. It is read at the start and at SIGHUP."""
    folder: Path | None = None
    """The folder of the reference's checkpoint (config.json and safetensors) with backend vllm, or a hub cache that
    has it. The hidden states of a pooling server need its output embedding, and adapters are made from all of it. If
    it is none, Hemostat uses the path that the server names, provided that it exists on this machine. The folder may
    appear after the start."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """The type of the weights with backend transformers. auto takes the type of the checkpoint."""
    device: Device = "auto"
    """The torch device. With transformers the model is on it. With vllm it computes the products of hidden states and
    the output embedding. auto takes a CUDA device that has enough free memory and no other process, else the CPU; the
    log and `hemostat check` say which one, and why."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """The number of CPU threads of each process that computes for a reference. none takes half of the cores."""


class Reasoning(Section):
    """The recognition of a reasoning model's thinking: by the ids of its start and end markers."""

    parser: str = "auto"
    """The name of vLLM's `--reasoning-parser`, whose markers the server's tokenizer turns into ids. auto takes markers
    that are single tokens of the vocabulary. With none, thinking is not distinguished. `hemostat check` prints the
    markers.
    """
    start: list[TokenId] = Field(default=[], max_length=32)
    """The ids of the start marker, in place of the marker of `parser`."""
    end: list[TokenId] = Field(default=[], max_length=32)
    """The ids of the end marker. They are required with `start`."""

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
    """The largest KL divergence from identity that a profile may cause in the distribution of one token (to second
    order, for a contextual profile). If `clamp_nats` is 2 or less, that limit is reached first."""
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
    force: ExistingFile | None = None
    """The file of a profile that is applied to every request, without evidence. It is meant for tests."""


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
    min_tokens: ClassVar[int] = 2_000
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


class Limits(Section):
    """The limits of what clients may send, and of how much of a relay process they may use."""

    buffered_bytes: int = Field(default=128 * 1024 * 1024, ge=1024 * 1024)
    """The memory of one relay process for heads and bodies, for requests that wait for a connection, and (up to a
    quarter of it) for copies that may have to be sent again. Beyond it, requests of the client that holds most are
    answered with 503."""
    connections_per_client: int = Field(default=8_192, ge=1, le=16_384)
    """The largest number of connections from one address (IPv6: one /64 network). Behind a load balancer all clients
    have its address: set it to 16384 there, which is what a relay process accepts of all clients."""


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
