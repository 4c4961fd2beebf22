"""The configuration: one YAML file, then `HEMOSTAT_…` environment (nested with `__`), then flags.

Whatever is wrong is one line that says where, which key, and what would be right; nothing else is raised.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import ipaddress
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from hemostat.store.factory import open_store
from hemostat.store.protocol import StoreFailure
from hemostat.store.valkey import MISSING_EXTRA, SERVER_SCHEMES, without_password
from hemostat_calibration.errors import HemostatError

ENV_PREFIX = "HEMOSTAT_"
FOREIGN_VARIABLES = frozenset({"HEMOSTAT_ADMIN_URL", "HEMOSTAT_ADMIN_TOKEN", "HEMOSTAT_PROFILE_DIR", "HEMOSTAT_VLLM"})
"""Read by the engine plugin and by make, not by the proxy."""
_KUBERNETES_NAME = re.compile(r"_SERVICE_(HOST|PORT)(_[A-Z0-9_]+)?$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_KUBERNETES_VALUE = re.compile(r"(tcp|udp|sctp)://")
MAX_FILE_BYTES = 1024 * 1024
MAX_LABELS = 32

EXPORTER = "opentelemetry-exporter-otlp-proto-http"
"""The distribution that sends traces; it brings the rest of `hemostat[tracing]`."""

_LABEL = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_HOST = re.compile(r"[A-Za-z0-9_.:%-]{1,255}")
_DEVICE = re.compile(r"cpu|cuda(:\d+)?|xpu(:\d+)?|mps")
_SECRET = re.compile(r"[!-~]{1,4096}")

_Key = tuple[str | int, ...]


class ConfigError(HemostatError):
    """The configuration is not usable; the text is one line."""


def _server_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"not an address ({error}); write it like http://127.0.0.1:8000") from error
    if parts.scheme not in {"http", "https"} or not parts.hostname or not _HOST.fullmatch(parts.hostname) or port == 0:
        shown = "the value" if "@" in value else _shown(value)
        raise ValueError(f"{shown} is not an http address; write it like http://127.0.0.1:8000")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not hold a user or a password; use api_key")
    if parts.path not in {"", "/"} or parts.query or parts.fragment:
        root = f"{parts.scheme}://{parts.netloc}"
        raise ValueError(f"{_shown(value)} has a path; give the server's root, {root}")
    return value.rstrip("/")


def _host(value: str) -> str:
    if not _HOST.fullmatch(value):
        raise ValueError(f"{_shown(value)} is not a host name or address")
    return value


def _secret(value: SecretStr) -> SecretStr:
    if not _SECRET.fullmatch(value.get_secret_value()):
        raise ValueError("must be printable ASCII without spaces, as it travels in a header")
    return value


def _existing_file(value: Path) -> Path:
    if not os.path.isfile(value):  # Path.is_file raises on names that are too long
        raise ValueError(f"there is no file {_shown(str(value))}")
    return value


def _existing_folder(value: Path) -> Path:
    if not os.path.isdir(value):
        raise ValueError(f"there is no folder {_shown(str(value))}")
    return value


def _nothing_is_none(value: object) -> object:
    return "none" if value is None else value


def _yaml_off(value: object) -> object:
    """YAML 1.1 reads an unquoted `off` as false."""
    return "off" if value is False else value


ServerUrl = Annotated[str, AfterValidator(_server_url)]
Host = Annotated[str, AfterValidator(_host)]
Secret = Annotated[SecretStr, AfterValidator(_secret)]
ExistingFile = Annotated[Path, AfterValidator(_existing_file)]
ExistingFolder = Annotated[Path, AfterValidator(_existing_folder)]
Port = Annotated[int, Field(ge=0, le=65535)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Backend = Annotated[Literal["transformers", "vllm", "none"], BeforeValidator(_nothing_is_none)]
Mode = Annotated[Literal["off", "observe", "auto"], BeforeValidator(_yaml_off)]


class Section(BaseModel):
    """A mapping in which only known keys stand."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: object, info: ValidationInfo) -> object:
        """pydantic would read `rate: yes` as 1.0."""
        if isinstance(value, bool) and info.field_name is not None:
            kind = _bare(cls.model_fields[info.field_name].annotation)
            if kind in {int, float}:
                raise ValueError("a number is expected, and an unquoted yes, no, on or off is none")
            if get_origin(kind) is Literal and not (value is False and "off" in get_args(kind)):
                shown = "on/yes/true" if value else "off/no/false"
                raise ValueError(f"an unquoted {shown} is not one of {', '.join(get_args(kind))}")
        return value


class Listen(Section):
    """The data port."""

    host: Host = "0.0.0.0"  # noqa: S104  the proxy is what clients talk to
    port: Port = 8080


class Admin(Section):
    """The admin port: metrics, health, console, JSON."""

    host: Host = "127.0.0.1"
    port: Port = 8081
    token: Secret | None = None
    metrics_need_token: bool = False
    """/metrics, too, asks for the token."""
    allowed_hosts: list[Host] = Field(default=[], max_length=64)
    """Names that the port may be called by, beside addresses and localhost. None: on loopback no other, else any."""

    @property
    def names(self) -> list[str] | None:
        """The names that are answered to; None: all."""
        return self.allowed_hosts if self.allowed_hosts or _is_loopback(self.host) else None


class Upstream(Section):
    """The vLLM server that runs the compressed model."""

    url: ServerUrl
    api_key: Secret | None = None
    """Sent where the client sends no Authorization of its own, and by Hemostat's own probes."""
    max_connections: int = Field(default=512, ge=1, le=65536)
    """Of each relay process."""
    ca: ExistingFile | None = None
    """PEM file of the authority that signed the upstream's certificate."""
    openai_sampling_defaults: bool = False
    """True when vLLM was started with `--generation-config vllm`, or the model's generation_config sets no sampling
    parameter. Otherwise what a request is sampled with is known only where it says so itself (or is greedy), and the
    rest is not used where the tokens' distribution has to be known."""


class Reference(Section):
    """The uncompressed model."""

    backend: Backend = "none"
    model: str | None = Field(default=None, min_length=1)
    """transformers: a folder or a hub name. vllm: the served name (default: the server's first)."""
    url: ServerUrl | None = None
    api_key: Secret | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: str = "cpu"
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of the in-process reference (default: half of the cores)."""

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not _DEVICE.fullmatch(value):
            raise ValueError(f"{_shown(value)} is not a device; use cpu, cuda, cuda:0 or mps")
        return value


class Shadow(Section):
    """Which requests are measured, and at what cost at most."""

    rate: float = Field(default=0.05, ge=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    allow_on: bool = False
    """Clients may force a request into the shadow with `X-Hemostat-Shadow: on`."""
    max_queue: int = Field(default=256, ge=1, le=100_000)
    max_tokens: int = Field(default=4096, ge=2, le=1_000_000)
    """Longest prompt + output that is scored."""
    reference_tokens_per_second: float = Field(default=0.0, ge=0)
    """0: as fast as the reference can."""
    top_k: int = Field(default=20, ge=1, le=1000)
    """At most the server's --max-logprobs."""
    floor_fraction: float = Field(default=0.02, ge=0, le=1)
    """Part of the scored requests that each model also scores against itself: the noise floor. It asks the compressed
    model's server for a prefill of their tokens."""


class Calibration(Section):
    """Learning and serving of decoding profiles."""

    mode: Mode = "observe"
    control_fraction: Fraction = 0.1
    held_out_fraction: Fraction = 0.3
    scope: Literal["pooled", "label", "route", "model"] = "pooled"
    """What may have a profile of its own, where it has proven better than the one for all."""
    clamp_nats: float = Field(default=1.0, gt=0, le=20)
    """Largest change of a logit. The smaller, the fewer held-out requests a profile needs to prove itself."""
    clamp_kl_nats: float = Field(default=2.0, gt=0, le=1000)
    """Largest KL from identity of what a profile does to one token's distribution (of a contextual one, to second
    order)."""
    alpha: Fraction = 0.05
    """Error probability of the promotion and rollback bounds."""
    min_tokens: int = Field(default=20_000, ge=1)
    """Scored tokens before a profile is proposed."""
    output_embedding: ExistingFolder | None = None
    """Folder of the reference's checkpoint (safetensors), for contextual profiles. A transformers reference has its
    own; with a vLLM reference there are none without it."""
    anchors: int = Field(default=512, ge=8, le=4096)
    """Ids whose logits a contextual profile reads."""
    rank: int = Field(default=192, ge=1, le=512)
    """The largest of a contextual profile: 2 bytes × rank × vocabulary is its size, about."""
    half_life_tokens: float | None = Field(default=2_000_000, gt=0)
    """Learned tokens after which one counts half; null never forgets."""
    recent_tokens: int = Field(default=65_536, ge=1_000, le=10_000_000)
    """The last ones, kept whole, in memory (2 bytes × (anchors + width of the hidden state) each), for what needs more
    than sums."""
    apply: Literal["engine", "request"] = "engine"
    force: ExistingFile | None = None
    """A profile put on every request, whatever the evidence: for tests."""


class StoreSettings(Section):
    """Where profiles and decisions are kept."""

    url: str = Field(default="memory://", repr=False)
    """With the server's password, where it has one."""

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        scheme, _, rest = value.partition("://")
        if value == "memory://" or (scheme == "sqlite" and rest.startswith("/") and len(rest) > 1):
            return value
        if scheme in SERVER_SCHEMES:
            if importlib.util.find_spec("redis") is None:
                raise ValueError(MISSING_EXTRA.removeprefix("store.url: "))
            try:
                open_store(value).close()
            except StoreFailure as failure:
                raise ValueError(str(failure).removeprefix("store.url: ")) from None
            return value
        shown = "the value" if "@" in value else _shown(value)
        raise ValueError(f"{shown} is none of memory://, sqlite:///path/to/file.db and redis://host:6379")

    @field_serializer("url")
    def _for_people(self, value: str) -> str:
        return without_password(value)


class Records(Section):
    """Scored requests as JSON lines."""

    path: Path | None = None
    """Off by default: a record holds token ids, and those are text."""


class Limits(Section):
    """What a client may send; more is answered with 431 or 413."""

    head_bytes: int = Field(default=64 * 1024, ge=1024, le=16 * 1024 * 1024)
    header_count: int = Field(default=128, ge=8, le=10_000)
    body_bytes: int = Field(default=256 * 1024 * 1024, ge=1024)


class Log(Section):
    """Standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"
    requests: bool = False
    """One line for each generation that is relayed: ids and outcomes, never what was said."""

    @field_validator("level", mode="before")
    @classmethod
    def _any_case(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value


class Alarm(Section):
    """When the alarm goes off."""

    budget_nats: float | None = Field(default=None, gt=0, lt=5)
    """Allowed KL(reference‖compressed) above the noise floor, per token; none: no budget test."""
    alpha: Fraction = 0.01
    """Chance of any false alarm, over all routes, both tests and the whole run."""
    baseline_tokens: int = Field(default=20_000, ge=0, le=1_000_000)
    """Of each route, from which the change test learns what is usual; 0: no change test."""
    clear_after: int = Field(default=30, ge=1)
    """Requests in a row that must look right again before an alarm clears."""


class Tracing(Section):
    """OpenTelemetry; needs the extra `hemostat[tracing]`."""

    endpoint: ServerUrl | None = None
    """An OTLP/HTTP receiver, like http://collector:4318; none: no traces."""
    ratio: float = Field(default=0.05, ge=0, le=1)
    """Part of the traces that begin here; a client's own decision is kept."""

    @field_validator("endpoint")
    @classmethod
    def _installed(cls, value: str | None) -> str | None:
        # Its API alone may have come with something else.
        if value is not None and not any(importlib.metadata.distributions(name=EXPORTER)):
            raise ValueError("needs OpenTelemetry: pip install 'hemostat[tracing]'")
        return value


class Settings(Section):
    """Everything that `hemostat serve` needs; only `upstream.url` has no default."""

    listen: Listen = Listen()
    admin: Admin = Admin()
    upstream: Upstream
    reference: Reference = Reference()
    shadow: Shadow = Shadow()
    calibration: Calibration = Calibration()
    labels: list[str] = Field(default=[], max_length=MAX_LABELS)
    store: StoreSettings = StoreSettings()
    records: Records = Records()
    workers: int = Field(default=1, ge=1, le=256)
    shutdown_seconds: float = Field(default=30.0, ge=0, le=3600)
    limits: Limits = Limits()
    alarm: Alarm = Alarm()
    log: Log = Log()
    tracing: Tracing = Tracing()

    @field_validator("labels")
    @classmethod
    def _label_names(cls, value: list[str]) -> list[str]:
        for label in value:
            if not _LABEL.fullmatch(label):
                raise ValueError(f"{_shown(label)} is not a label; use at most 64 letters, digits, _ . -")
        if len(set(value)) < len(value):
            raise ValueError("a label stands there twice")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Settings:
        if self.admin.token is None and not _is_loopback(self.admin.host):
            raise ValueError(
                f"admin.token: required, as admin.host {self.admin.host} is not loopback; set it, or host: 127.0.0.1"
            )
        if self.admin.metrics_need_token and self.admin.token is None:
            raise ValueError("admin.metrics_need_token: there is no token to need; set admin.token")
        if self.listen.port == self.admin.port != 0:
            raise ValueError(f"admin.port: {self.admin.port} is listen.port too; choose another")
        if self.reference.backend == "transformers" and self.reference.model is None:
            raise ValueError("reference.model: required with reference.backend: transformers; a folder or a hub name")
        if self.calibration.scope == "label" and not self.labels:
            raise ValueError("labels: required with calibration.scope: label; list what X-Hemostat-Label may be")
        if self.calibration.scope != "pooled" and self.calibration.apply == "request":
            raise ValueError("calibration.scope: only pooled goes with calibration.apply: request")
        if self.reference.backend == "vllm" and self.reference.url is None:
            raise ValueError("reference.url: required with reference.backend: vllm, like http://127.0.0.1:8001")
        return self

    def plain(self) -> dict[str, Any]:
        """JSON-ready, with the secrets in clear: for Hemostat's own processes only. `model_validate` takes it back."""
        plain: dict[str, Any] = _uncovered(self)
        return plain

    def redacted(self) -> dict[str, Any]:
        """JSON-ready, secrets starred: for people."""
        return self.model_dump(mode="json")


def load(
    path: Path | None,
    env: Mapping[str, str] | None = None,
    overrides: Iterable[tuple[str, str]] = (),
) -> Settings:
    """Read `path` (None: no file), lay `env` (None: the process's) over it, then the flags: (dotted key, text) pairs.

    Raises ConfigError.
    """
    data, places = _read(path) if path is not None else ({}, {})
    for name, text in sorted((os.environ if env is None else env).items()):
        if name.startswith(ENV_PREFIX) and not _foreign(name, text):
            _lay(data, places, name.removeprefix(ENV_PREFIX).lower().split("__"), text, name)
    for key, text in overrides:
        _lay(data, places, key.split("."), text, f"--set {key}")
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, path, places)) from None


def _read(path: Path) -> tuple[dict[str, Any], dict[_Key, str]]:
    """The file's mapping, and for every key in it the place to name in an error."""
    name = _one_line(str(path))
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{name}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{name}: longer than {MAX_FILE_BYTES} bytes")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not UTF-8 (byte {error.start})") from None
    places: dict[_Key, str] = {}
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return {}, places
        _walk(node, (), name, places, set())
        data = loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        raise ConfigError(f"{where}: not YAML: {_one_line(getattr(error, 'problem', None) or str(error))}") from None
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        # PyYAML's constructors let these out for a value that does not fit its tag (2024-13-45, !!int "").
        raise ConfigError(f"{name}: not YAML: {_one_line(str(error))}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deep") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{name}: holds {_shown(data)}; a mapping is expected, such as `upstream:` with `url:` in it")
    # A section whose keys are all commented out reads as nothing.
    return {k: {} if v is None and k in _SECTIONS else v for k, v in data.items()}, places


def _walk(node: yaml.Node, key: _Key, name: str, places: dict[_Key, str], seen: set[int]) -> None:
    """Note the line of every key; raise ConfigError for one that stands twice (YAML would keep the last in silence)."""
    if id(node) in seen or not isinstance(node, yaml.MappingNode):
        return
    seen.add(id(node))
    for key_node, value_node in node.value:
        where = f"{name}:{key_node.start_mark.line + 1}"
        merge = key_node.tag == "tag:yaml.org,2002:merge"
        if not merge and key_node.tag != "tag:yaml.org,2002:str":
            raise ConfigError(_one_line(f"{where}: {_shown(key_node.value)}: unknown key; every key is a word"))
        child = (*key, str(key_node.value))
        if child in places and not merge:
            raise ConfigError(f"{where}: {_dotted(child)}: stands there twice")
        places[child] = where
        _walk(value_node, child, name, places, seen)


def _lay(data: dict[str, Any], places: dict[_Key, str], parts: list[str], text: str, source: str) -> None:
    """Put one value from outside the file where it belongs."""
    dotted = ".".join(parts)
    if dotted not in _LEAVES:
        below = [leaf for leaf in _LEAVES if leaf.startswith(dotted + ".")]
        near = (
            below[0]
            if below
            else _nearest(dotted.replace("_", "."), {leaf.replace("_", "."): leaf for leaf in _LEAVES})
        )
        hint = f"; did you mean {_spelled(near, source)}?" if near else ""
        what = "a section, not a key" if below else "unknown"
        raise ConfigError(_one_line(f"{source}: {what}{hint}"))
    into = data
    for n, part in enumerate(parts[:-1], 1):
        if into.get(part) is None:
            into[part] = {}
        into = into[part]
        if not isinstance(into, dict):
            section = tuple(parts[:n])
            raise ConfigError(f"{places.get(section, source)}: {_dotted(section)}: {_shown(into)} is not a mapping")
    into[parts[-1]] = _from_text(text, _LEAVES[dotted])
    places[tuple(parts)] = source.partition(" ")[0]


def _from_text(text: str, annotation: object) -> object:
    """Environment and flags hold text; pydantic reads numbers and truths from it, lists and nothing are read here."""
    if text.strip().lower() in {"", "null"} and type(None) in get_args(annotation):
        return None
    if get_origin(annotation) is list:
        return [part.strip() for part in text.strip().strip("[]").split(",") if part.strip()]
    return text


def _explain(error: ValidationError, path: Path | None, places: Mapping[_Key, str]) -> str:
    """The first error in one line, with how many more there are."""
    errors = error.errors(include_url=False)
    # An unknown key is the likeliest cause of whatever else is missing.
    errors.sort(key=lambda e: e["type"] != "extra_forbidden")
    first = errors[0]
    key = tuple(first["loc"])
    kind = first["type"]
    where = next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), None)
    if where is None:
        where = _one_line(str(path)) if path is not None else "configuration"
    if kind == "extra_forbidden":
        text = f"unknown key{_hint(key)}"
    elif kind == "missing":
        missing = (*key, "url") if key == ("upstream",) else key
        key = missing
        text = "required, like http://127.0.0.1:8000 (the vLLM server that runs the compressed model)"
    elif kind == "value_error":
        text = str(first["ctx"]["error"])
    elif kind in {"model_type", "model_attributes_type"}:
        fields = ", ".join(_section(key).model_fields)
        text = f"{_shown(first['input'])} is not a mapping; its keys are {fields}"
    elif kind == "literal_error":
        allowed = get_args(_bare(_LEAVES[_dotted(key)]))
        near = _nearest(str(first["input"]), dict.fromkeys(allowed))
        text = f"{_shown(first['input'])} is not one of {', '.join(allowed)}" + (
            f"; did you mean {near}?" if near else ""
        )
    else:
        secret = _bare(_LEAVES.get(_dotted(key))) is SecretStr
        shown = "the value" if secret else _shown(first["input"])
        text = f"{shown} does not fit: {first['msg'].removeprefix('Input ')}"
        if kind == "string_type" and isinstance(first["input"], int | float):
            text += "; put it in quotes"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    label = f"{_dotted(key)}: " if key else ""
    return _one_line(f"{where}: {label}{text}{more}")


def _hint(key: _Key) -> str:
    """What an unknown key was probably meant to be."""
    known = list(_section(key[:-1]).model_fields)
    last = str(key[-1])
    prefix = _dotted(key[:-1]) + "." if len(key) > 1 else ""
    near = _nearest(last, {name: prefix + name for name in known})
    if near is None:  # right name, wrong place
        near = next((leaf for leaf in _LEAVES if leaf.rpartition(".")[2] == last), None)
    if near is None:
        near = _nearest(prefix + last, {leaf: leaf for leaf in _LEAVES})
    return f"; did you mean {near}?" if near else f"; known here: {', '.join(known)}"


def _nearest(word: str, known: Mapping[str, str | None]) -> str | None:
    """The value of the closest key (or the key itself where the value is None)."""
    close = difflib.get_close_matches(word[:200], list(known), 1, 0.6)
    return (known[close[0]] or close[0]) if close else None


def _spelled(dotted: str, source: str) -> str:
    return dotted if source.startswith("--") else ENV_PREFIX + dotted.upper().replace(".", "__")


def _foreign(name: str, text: str) -> bool:
    """True for variables of Hemostat's other parts, and those that Kubernetes makes of a Service called hemostat."""
    return (
        name in FOREIGN_VARIABLES
        or _KUBERNETES_NAME.search(name) is not None
        or (name.endswith("_PORT") and _KUBERNETES_VALUE.match(text) is not None)
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _uncovered(value: object) -> Any:
    match value:
        case BaseModel():
            return {name: _uncovered(getattr(value, name)) for name in type(value).model_fields}
        case SecretStr():
            return value.get_secret_value()
        case Path():
            return str(value)
    return value


def _section(key: Sequence[str | int]) -> type[Section]:
    """The model at `key`, or the nearest one above it."""
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


def _bare(annotation: object) -> object:
    """The type inside Optional and Annotated."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    arguments = get_args(annotation)
    if type(None) in arguments:
        return _bare(next(a for a in arguments if a is not type(None)))
    return annotation


def _dotted(key: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in key)


def _shown(value: object) -> str:
    """A short picture of any value, cyclic or vast ones too."""
    return reprlib.repr(value)


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


_LEAVES: dict[str, object] = dict(_leaves(Settings))
"""Every key that holds a value -> its type."""
_SECTIONS = {leaf.partition(".")[0] for leaf in _LEAVES if "." in leaf}
