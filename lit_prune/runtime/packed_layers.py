"""Linear layers and embeddings that compute with packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lit_prune.ops.packing import Layout, PackedWeight
from lit_prune.ops.quantization import CHUNK
from lit_prune.runtime.kernel import Kernel, kernel_on


class _Packed(nn.Module):
    """Base class of modules whose weight is packed; its parts are buffers of integers, which no cast changes."""

    values: Tensor
    mask: Tensor
    scales: Tensor

    def __init__(self, layout: Layout, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.layout = layout
        for name, (shape, dtype) in layout.parts().items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        self._kernel: Kernel | None = None

    @property
    def packed(self) -> PackedWeight:
        """The packed weight."""
        return PackedWeight(self.layout, self.values, self.mask, self.scales)

    def set(self, packed: PackedWeight) -> None:
        """Replace the weight, after a check: files may be damaged, and a kernel would read outside of its parts.

        Raises:
            InputError: if the parts do not belong together.
        """
        packed.check("weight")
        self.layout = packed.layout
        self.values, self.mask, self.scales = packed.values, packed.mask, packed.scales
        self._kernel = None

    def check(self, name: str) -> None:
        """Raise ``InputError`` if the parts do not belong together."""
        self.packed.check(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._kernel = None  # it refers to the memory of the parts
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._kernel = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernel": None}

    def kernel(self) -> Kernel | None:
        """Return the kernel for the weight; None, with a warning, if there is none on its device."""
        if self._kernel is None and (make := kernel_on(self.values.device)):
            self.check("weight")
            self._kernel = make(self.packed)
        return self._kernel

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x Wᵀ + bias``, ``[..., o]``, of inputs ``[..., i]`` in any float dtype.

        A few tokens are multiplied by the packed weight, 8 on CPUs and 16 on CUDA devices; for more, it is unpacked
        tile by tile. Gradients reach the inputs, never the weight.
        """
        kernel = self._kernel or self.kernel()
        if kernel is None or (torch.is_grad_enabled() and x.requires_grad):
            return linear(x, self.packed.unpack(x.dtype), bias)
        if x.numel() <= kernel.most_tokens * x.shape[-1]:
            y = kernel.multiply(x)
        else:
            y = self._by_tiles(kernel, x.detach().reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        return y if bias is None else y + bias

    def _by_tiles(self, kernel: Kernel, tokens: Tensor) -> Tensor:
        """Return the product with many tokens ``[t, i]``, ``[t, o]``, in tiles of a size for the kernel."""
        outputs, inputs = self.layout.shape
        y = tokens.new_empty(len(tokens), outputs)
        rows = max(1, kernel.most_expanded // inputs)
        for first in range(0, outputs, rows):
            last = min(first + rows, outputs)
            torch.mm(tokens, kernel.expand(first, last, tokens.dtype).T, out=y[:, first:last])
        return y

    def extra_repr(self) -> str:
        """Return shape and kind of the weight, for ``print(model)``."""
        outputs, inputs = self.layout.shape
        masked = f", {self.packed.bits_per_weight:.1f} bits per weight" if self.values.device.type != "meta" else ""
        return f"in_features={inputs}, out_features={outputs}, {self.layout.kind}{masked}"


class PackedLinear(_Packed):
    """A linear layer with a packed weight ``[o, i]``, for inference: a few tokens multiply it as it is."""

    def __init__(
        self, layout: Layout, bias: nn.Parameter | None = None, transposed: bool = False, device: Any = None
    ) -> None:
        """Allocate the parts of a layout; ``set`` fills them.

        Args:
            layout: types and sizes of the weight.
            bias: bias ``[o]``, which is not packed; None = none.
            transposed: whether the dense layer is GPT-2's Conv1D, whose parameter is ``[i, o]``.
            device: device of the parts.
        """
        super().__init__(layout, device)
        self.out_features, self.in_features = layout.shape
        self.bias, self.transposed = bias, transposed

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ + b``, ``[..., o]``."""
        return self.multiply(x, self.bias)


class PackedEmbedding(_Packed):
    """An embedding with a packed weight ``[vocabulary, d]`` without a mask."""

    _like: Tensor

    def __init__(self, layout: Layout, dtype: torch.dtype, device: Any = None) -> None:
        """Allocate the parts of a layout; ``set`` fills them.

        Args:
            layout: types and sizes of the weight.
            dtype: dtype of the embeddings.
            device: device of the parts.
        """
        super().__init__(layout, device)
        self.num_embeddings, self.embedding_dim = layout.shape
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)  # follows casts

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings ``[..., d]`` of token ids."""
        rows = self.values[: self.num_embeddings * self.layout.chunks * CHUNK].reshape(self.num_embeddings, -1)
        layout = Layout(self.layout.kind, (ids.numel(), self.embedding_dim), 0, False)
        ids = ids.to(rows.device)
        picked = rows[ids.flatten()].flatten()
        scales = self.scales[ids.flatten()] if self.layout.groups else self.scales
        embeddings = PackedWeight(layout, picked, self.mask, scales).unpack(self._like.dtype)
        return embeddings.reshape(*ids.shape, -1)


class TiedHead(nn.Module):
    """The head of a language model, with the weight of its embedding."""

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None = None) -> None:
        """Refer to the embedding, whose state is not the head's too."""
        super().__init__()
        self._embedding = (embedding,)
        self.out_features, self.in_features = embedding.layout.shape
        self.bias = bias

    @property
    def embedding(self) -> PackedEmbedding:
        """The embedding that the head is tied to."""
        return self._embedding[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[..., vocabulary]``."""
        return self.embedding.multiply(x, self.bias)
