"""The sections of the configuration that name the models: the upstream, the references, and how a model thinks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from hemostat.config.fields import (
    Backend,
    Device,
    EnginesUrl,
    ExistingFile,
    ModelName,
    Secret,
    Section,
    ServerUrl,
    TokenId,
    text_is_model,
)
from hemostat.config.reasoning_parsers import PARSERS
from hemostat.config.text import short_repr

MAX_ENGINES = 64
MAX_MODELS = 16
"""The largest number of served models with references of their own. With backend transformers each different reference
is a process. It holds its weights in memory from the moment when its model is first seen on the server."""


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
    outlier: Literal["report", "exclude"] = "report"
    """With `exclude`, an engine gets no new requests while canaries say that it has changed and differs from the other
    engines, or treats texts otherwise. At most half of the engines are excluded: never the last one, and never both of
    two. With `report`, it is only said."""
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
