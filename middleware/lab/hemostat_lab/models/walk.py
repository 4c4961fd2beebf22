"""A model's hidden states on texts, and the gradients at them, by depth: one decoder layer is loaded at a time.

Forwards, the hidden states before each layer are stored; backwards, from the last layer to the first, each layer is
computed again. So the memory is that of one layer and of the hidden states at one depth. What is stored survives the
process: a walk that is killed goes on at the layer where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import numpy.typing as npt
import torch

from hemostat_lab.models.activations import Batch, Calls, embed, make_batches, output_gradients, run_layer
from hemostat_lab.models.parts import Parts
from hemostat_lab.models.skeleton import Skeleton, WeightSource

Around = Callable[[Batch], AbstractContextManager[None]]
"""Made for each batch, and active while that batch is in a layer: hooks that measure it."""


class LayerWalk:
    """Texts through one model.

    names: of the decoder layers. batches: the texts. passed: called with a layer's index when its hidden states are
    stored.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        source: WeightSource,
        texts: Sequence[npt.NDArray[np.int32]],
        parts: Parts,
        *,
        seed: int,
        passed: Callable[[int], None] = lambda index: None,
    ) -> None:
        """seed: of the tokens that the gradients are taken for (`output_gradients`)."""
        self.skeleton = skeleton
        self.names = list(skeleton.layers)
        self.batches: list[Batch] = make_batches(texts, skeleton.device)
        self._source = source
        self._parts = parts
        self._seed = seed
        self._passed = passed
        self._embedded: tuple[list[torch.Tensor], list[Calls]] | None = None

    @contextmanager
    def loaded(self, n: int) -> Iterator[None]:
        """Layer `n` has its weights inside of the context."""
        with self.skeleton.loaded(self.skeleton.parameters_of(self.names[n]), self._source):
            yield

    def embeddings(self) -> tuple[list[torch.Tensor], list[Calls]]:
        """The hidden states before the first layer, and the arguments of all layers, by batch."""
        if self._embedded is None:
            hidden, calls = embed(self.skeleton, self._source, self.batches)
            self._embedded = [states.cpu() for states in hidden], calls
        return self._embedded

    def hidden(self, n: int) -> list[torch.Tensor]:
        """Before layer `n`, by batch: stored, or computed from the nearest layer below that is."""
        start, states = nearest_stored(self._parts, _hidden, n)
        if states is None:
            states, _ = self.embeddings()
            self._parts.put_list(_hidden(0), states)
        for m in range(start, n):
            with self.loaded(m):
                states = self.forward(m, states)
            self._parts.put_list(_hidden(m + 1), states)
            self._passed(m)
        return states

    def gradient(self, n: int) -> list[torch.Tensor]:
        """At the hidden states before layer `n` (after the last one: at the model's end), by batch."""
        result = self._parts.get_list(_gradient(n))
        if result is not None:
            return result
        if n == len(self.names):
            result = output_gradients(self.skeleton, self._source, self.batches, self.hidden(n), self._seed)
        else:
            later = self.gradient(n + 1)
            hidden = self.hidden(n)
            with self.loaded(n):
                result = self.backward(n, hidden, later)
        self._parts.put_list(_gradient(n), result)
        return [gradient.cpu() for gradient in result]

    def forward(self, n: int, hidden: Sequence[torch.Tensor], context: Around | None = None) -> list[torch.Tensor]:
        """The hidden states after layer `n`, which is loaded, by batch."""
        after = []
        _, calls = self.embeddings()
        for batch, states, call in zip(self.batches, hidden, calls, strict=True):
            on_device = states.to(self.skeleton.device)
            with torch.no_grad(), nullcontext() if context is None else context(batch):
                output = run_layer(self.skeleton, n, on_device, call)
            after.append(output.cpu())
        return after

    def backward(
        self, n: int, hidden: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], context: Around | None = None
    ) -> list[torch.Tensor]:
        """The gradient at the inputs of layer `n`, which is loaded, of that at its outputs, by batch."""
        before = []
        _, calls = self.embeddings()
        for batch, states, gradient, call in zip(self.batches, hidden, gradients, calls, strict=True):
            leaf = states.to(self.skeleton.device).requires_grad_(True)
            with nullcontext() if context is None else context(batch):
                output = run_layer(self.skeleton, n, leaf, call)
                torch.autograd.backward(output, gradient.to(output.device))
            assert leaf.grad is not None
            before.append(leaf.grad.cpu())
        return before

    def measure(
        self,
        n: int,
        context: Around,
        *,
        backwards: bool,
        prepare: Callable[[Sequence[torch.Tensor]], None] = lambda hidden: None,
    ) -> None:
        """Pass all batches through layer `n`, and store what the layer that is measured next needs: its outputs, or,
        `backwards`, the gradient at its inputs. prepare: called before, when the layer is loaded, with the hidden
        states before it, by batch."""
        gradients = self.gradient(n + 1) if backwards else None
        hidden = self.hidden(n)
        with self.loaded(n):
            prepare(hidden)
            if gradients is not None:
                self._parts.put_list(_gradient(n), self.backward(n, hidden, gradients, context))
            else:
                self._store(n, self.forward(n, hidden, context))

    def pass_on(self, n: int, context: Around) -> None:
        """As `measure` forwards, of a layer that is loaded already."""
        self._store(n, self.forward(n, self.hidden(n), context))

    def _store(self, n: int, outputs: list[torch.Tensor]) -> None:
        """Of layer `n`, if another one follows it."""
        if n + 1 < len(self.names):
            self._parts.put_list(_hidden(n + 1), outputs)

    def leave(self, n: int, *, backwards: bool) -> None:
        """Drop what no other layer needs once the measurements of layer `n` are stored."""
        self._parts.drop(_hidden(n + 1 if backwards else n))
        self._parts.drop(_gradient(n + 1))

    def drop(self) -> None:
        """Everything that is stored."""
        for n in range(len(self.names) + 1):
            self._parts.drop(_hidden(n))
            self._parts.drop(_gradient(n))


def nearest_stored(parts: Parts, name: Callable[[int], str], n: int) -> tuple[int, list[torch.Tensor] | None]:
    """What `Parts.put_list` stored as `name(m)`, for the largest m of at most n for which there is something, and that
    m; 0 and None where there is nothing."""
    for m in range(n, -1, -1):
        states = parts.get_list(name(m))
        if states is not None:
            return m, states
    return 0, None


def _hidden(n: int) -> str:
    return f"hidden-{n:04d}"


def _gradient(n: int) -> str:
    return f"gradient-{n:04d}"
