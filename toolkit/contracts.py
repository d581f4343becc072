"""What components promise each other: the protocols, the small values they pass, the axis legend.

Axis letters, the same in every file of this repository:

    B batch         T time (sequence)    D model width     L layers
    H heads         N head size          V vocabulary      E extra image tokens
    M answer positions (rows that carry a label, over the whole batch)
    height, width   sides of an image feature grid; P = height * width patches

Importing this module never imports torch: tensors appear in annotations only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

IGNORE = -100
"""Label of a position that carries no loss."""

PAD_ID = 0
"""Token id of padding (and of end of text) in the RWKV world vocabulary."""

END_ID = 261
"""Token id of two newlines, which end a turn, in the RWKV world vocabulary."""

NO_IMAGE = -1
"""`image_start` of a sample without an image."""


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation, as LLaVA data writes it (`<image>` may stand in `text`)."""

    role: Literal["human", "gpt"]
    text: str


@dataclass(frozen=True)
class Text:
    """Text that is tokenised on its own; `loss` says whether its tokens are learned."""

    text: str
    loss: bool = False


@dataclass(frozen=True)
class ImageSlot:
    """The place of the image vectors in the sequence."""


Segment = Text | ImageSlot


@dataclass(frozen=True)
class ImageFeatures:
    """Image vectors on a grid.

    patches: [B, height*width, D], row-major. extra: [B, E, D], e.g. the class token; extra
    vectors follow the patches in the sequence and are never scanned. grid: (height, width).
    """

    patches: Tensor
    extra: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class Whole:
    """What the loss of a step is a mean over: all its micro batches on all ranks.

    samples: slots, those of weight 0 included. answers: labels to be predicted in samples that count.
    positions: samples times the longest padded sequence.
    """

    samples: int
    answers: int
    positions: int


@dataclass
class Batch:
    """What one training or evaluation step reads. Padding is on the right.

    ids, labels: [B, T] long; image positions hold PAD_ID and IGNORE. lengths: [B] long.
    image_start: [B] long, NO_IMAGE for text-only samples. Either `pixels` (what the encoder's
    transform made, stacked; any tensor or nested tuple of tensors) or `features` covers the
    samples that have an image, in batch order. weight: [B] float, 0 for a slot that only fills.
    keys: sample keys, for predictions and reports. answers, images: rows that `model.answer_rows`
    and `model.image_rows` find, made on the CPU before a batch moves to a GPU, so that no step has to wait
    for the device; None where the model is to look itself.
    longest: [] the largest of `lengths`, for a batch padded to a length fixed beforehand: what is beyond it
    and `answers` without a label (fillers) count for nothing. None: T is the longest sample's.
    whole: the step that this is a part of; None: a step of its own.
    """

    ids: Tensor
    labels: Tensor
    lengths: Tensor
    image_start: Tensor
    weight: Tensor
    keys: Sequence[str]
    pixels: Any = None
    features: ImageFeatures | None = None
    answers: Tensor | None = None
    images: Tensor | None = None
    longest: Tensor | None = None
    whole: Whole | None = None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with `change` applied to each of its tensors."""
        values = {name: mapped(value, change) for name, value in vars(self).items() if name not in _PLAIN}
        return Batch(**values, keys=self.keys, whole=self.whole)

    def __getstate__(self) -> dict[str, Any]:
        """For the way from a loader's worker: small tensors as bytes among the rest.

        torch hands every tensor over by a file and a socket of its own, half a millisecond each.
        """
        return {n: v if n in _PLAIN else mapped(v, _small_as_array) for n, v in vars(self).items()}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update({n: v if n in _PLAIN else mapped(v, _as_tensor) for n, v in state.items()})

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, read by a GPU while the CPU goes on; DataLoader asks for it."""
        return self.mapped(lambda tensor: tensor.pin_memory())


_PLAIN = ("keys", "whole")
"""What of a batch holds no tensor."""

_SMALL = 1 << 16
"""Bytes of a tensor up to which copying it costs less than sharing its memory."""


def _small_as_array(tensor: Tensor) -> Any:
    # NumPy has no bfloat16.
    small = tensor.device.type == "cpu" and tensor.nbytes <= _SMALL and tensor.element_size() != 2
    return tensor.numpy() if small else tensor


def _as_tensor(value: Any) -> Tensor:
    import torch

    return value if isinstance(value, torch.Tensor) else torch.from_numpy(value)


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A tensor, image features or nested tuples of tensors, each tensor changed; None stays None."""
    if isinstance(value, tuple):
        return tuple(mapped(part, change) for part in value)
    if isinstance(value, ImageFeatures):
        return ImageFeatures(change(value.patches), change(value.extra), value.grid)
    return value if value is None else change(value)


class Encoder(Protocol):
    """Pixels to image features. Registered with `register.encoder`; wired: nothing."""

    d_out: int
    grid: tuple[int, int]
    n_extra: int
    learned: bool
    """True if the encoder is trained from scratch (its stage must list `encoder`)."""

    def transform(self) -> Callable[[Image], Any]:
        """Maps a PIL image to what `forward` takes for one sample (deterministic)."""

    def forward(self, pixels: Any) -> ImageFeatures: ...


class Projector(Protocol):
    """Image features to model width. Registered with `register.projector`; wired: d_in, d_out, grid."""

    grid: tuple[int, int]

    def forward(self, features: ImageFeatures) -> ImageFeatures: ...


Scan = Callable[[int, int, int], Sequence[Sequence[int]]]
"""(n_layer, height, width) -> per layer the row-major patch indices in reading order.

Each row is a permutation of range(height * width). Plain integers: no torch needed.
"""

Prompt = Callable[[Sequence[Turn]], list[Segment]]
"""Turns -> segments. A conversation ending in a human turn asks for an answer and ends in `Assistant:`."""


class TimeMix(Protocol):
    """Mixes over time. state is None (start from zero) or what an earlier call returned.

    Optional, for generation: step_(x, late, norm, state) -> late, one token in place. x [B,D] takes in what
    was `late` (`kernels.step.Late`), the LayerNorm `norm` follows, the state is overwritten, and the mixer's
    own output is the next `late`. A mixer without it runs `forward` with T = 1.
    """

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, stream: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """x [B,T,D] -> (y [B,T,D], state at each sample's own end, stream).

        `stream` [B,T,D] is a per-token side value that travels through the layers beside x and is
        reordered with it (RWKV-7's first-layer values); None where a recurrence needs none.
        `lengths` [B] marks right padding; None means every sample has T tokens.
        """


class ChannelMix(Protocol):
    """Mixes over channels; its state is the last token, for the token shift. `step_` as for `TimeMix`."""

    def forward(self, x: Tensor, state: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B,T,D] -> (y [B,T,D], state [B,D])."""


class Recurrence(Protocol):
    """A pair of mixers per layer. Registered with `register.recurrence`; wired: d_model, n_layer."""

    def time_mix(self, layer: int) -> nn.Module: ...

    def channel_mix(self, layer: int) -> nn.Module: ...


class Unindexed(Protocol):
    """Tars that are read from front to back (`data.streamed.Streamed`); nobody knows how many samples."""

    @property
    def urls(self) -> tuple[str, ...]: ...

    def shards(self) -> list[str]: ...


DataSource = Mapping[str, Path | Unindexed]
"""What a `register.data` factory returns (wired: cache): split name -> folder with manifest.json, or tars to
stream."""
