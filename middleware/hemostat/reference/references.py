"""The references that the configuration names, by the served base model that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from hemostat.config.models import ModelReference
from hemostat.config.schema import Settings
from hemostat.reference.protocol import Reference

if TYPE_CHECKING:
    from hemostat.reference.vllm import VllmReference


NO_MODELS: Mapping[str, Reference] = MappingProxyType({})


class References:
    """Owns the references; each is started by whoever first needs it.

    first: belongs to the server's first base model. by_model: in place of that, by served name; several names may share
    one reference.
    """

    def __init__(self, first: Reference | None = None, by_model: Mapping[str, Reference] = NO_MODELS) -> None:
        self.first = first
        self.by_model = by_model

    def of(self, name: str, *, is_first: bool) -> Reference | None:
        """Returns the reference of a model; None if it has none. name: of a served base model. is_first: it is the
        server's first.
        """
        return self.first if self.first is not None and is_first else self.by_model.get(name)

    def __iter__(self) -> Iterator[Reference]:
        """Yields each reference once."""
        yield from {
            id(reference): reference for reference in (self.first, *self.by_model.values()) if reference is not None
        }.values()

    async def close(self) -> None:
        for reference in self:
            await reference.close()


def make_references(settings: Settings) -> References | None:
    """Returns the configured references, none of them started; None with `reference.backend: none`."""
    wanted = settings.reference
    if wanted.backend == "none":
        return None
    if not wanted.models:
        return References(_make(settings, None))
    made: dict[ModelReference, Reference] = {}
    for model in wanted.models.values():
        # Two served models of one reference (two quantizations, say) share its process or connection.
        if model not in made:
            made[model] = _make(settings, model)
    return References(by_model={name: made[model] for name, model in wanted.models.items()})


def _make(settings: Settings, reference: ModelReference | None) -> Reference:
    """Makes one reference. reference: None for `reference.model`."""
    wanted = settings.reference
    model = reference.model if reference is not None else wanted.model
    device = (reference.device if reference is not None else None) or wanted.device
    if wanted.backend == "transformers":
        from hemostat.reference.transformers import TransformersReference  # noqa: PLC0415  only what is used

        assert model is not None
        return TransformersReference(model, wanted.dtype, device, wanted.threads)
    from hemostat.reference.on_server import ServerReference  # noqa: PLC0415

    url = (reference.url if reference is not None else None) or wanted.url
    folder = (reference.folder if reference is not None else None) or wanted.folder
    assert url is not None
    return ServerReference(
        url,
        wanted.api_key,
        model,
        settings.shadow.top_k,
        folder=folder,
        device=device,
        threads=wanted.threads,
    )


def make_compressed_scorer(settings: Settings) -> VllmReference | None:
    """Returns the upstream as a scorer of its own tokens, for the noise floor; None if that is not measured."""
    if settings.reference.backend == "none" or settings.shadow.floor_fraction <= 0.0:
        return None
    from hemostat.reference.vllm import VllmReference  # noqa: PLC0415

    upstream = settings.upstream
    return VllmReference(upstream.servers[0], upstream.api_key, top_k=settings.shadow.top_k, ca=upstream.ca)
