"""The references by the served base model that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from hemostat.reference.protocol import Reference

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
