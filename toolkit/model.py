"""VisualRWKV: frozen vision encoder -> projector -> image vectors spliced into an RWKV language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.contracts import IGNORE, NO_IMAGE, Batch, Encoder, ImageFeatures, Projector
from toolkit.loss import Answers
from toolkit.trunk import LanguageModel, ScanSteps, State


class VisualRWKV(nn.Module):
    """The model. Sub-modules are named as the released checkpoints name theirs: `proj.*`, `rwkv.*`.

    A sample's logits depend on that sample alone. Paper: the original left-pads the text before the
    image to one length per batch with token 0, which its recurrence reads, and gives text-only
    samples zero vectors for an image; here padding is on the right and text-only samples have no image.
    """

    # Modules that keep contracts.Encoder and contracts.Projector; a protocol cannot say "and a Module".
    encoder: Any
    proj: Any

    def __init__(
        self,
        encoder: Encoder,
        projector: Projector,
        rwkv: LanguageModel,
        *,
        table: Sequence[Sequence[int]],
        extra_first: bool = False,
    ) -> None:
        """table: the scan, [n_layer][P]. extra_first: whether the extra vectors precede the patches.

        Paper: the class token follows the patches in v5.1 and v6.0, and precedes them in v5.0 and v5.2.
        """
        super().__init__()
        self.encoder = encoder
        self.proj = projector
        self.rwkv = rwkv
        self.scan = ScanSteps(table)
        self.extra_first = extra_first

    @property
    def n_image(self) -> int:
        """Positions that an image takes in the sequence: patches, then extra vectors."""
        height, width = self.proj.grid
        return int(height * width + self.encoder.n_extra)

    def encode(self, pixels: Any) -> ImageFeatures:
        """What the encoder's transform made, stacked -> features; no graph while the encoder is frozen."""
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.encoder.parameters())
        with torch.set_grad_enabled(learns):
            features: ImageFeatures = self.encoder(pixels)
            return features

    def train(self, mode: bool = True) -> VisualRWKV:
        """As nn.Module's, but a frozen encoder stays in eval mode (dropout off, batch norm fixed)."""
        super().train(mode)
        for part in (self.encoder, *encoders(self.encoder).values()):
            part.train(mode and any(p.requires_grad for p in part.parameters()))
        return self

    def embed(self, batch: Batch) -> Tensor:
        """Token embeddings with the image vectors written over their placeholders, [B, T, D]."""
        x = self.rwkv.emb(batch.ids)
        features = batch.features
        if features is None:
            if batch.pixels is None:
                return x
            features = self.encode(batch.pixels)
        projected = self.proj(features)
        parts = (projected.patches, projected.extra)
        vectors = torch.cat(parts[::-1] if self.extra_first else parts, dim=1)  # [n_images, n_image, D]
        rows = image_rows(batch) if batch.images is None else batch.images  # [n_images]
        first = rows * x.shape[1] + batch.image_start[rows]
        places = first.unsqueeze(1) + torch.arange(vectors.shape[1], device=x.device)  # [n_images, n_image]
        flat = x.flatten(0, 1).index_copy(0, places.flatten(), vectors.flatten(0, 1).to(x.dtype))
        return flat.view(x.shape)

    def scan_start(self, batch: Batch) -> Tensor:
        """Where the patches begin, [B]: at the image, or behind the extra vectors that precede them."""
        start = batch.image_start
        return start + self.encoder.n_extra * (start != NO_IMAGE) if self.extra_first else start

    def hidden(self, batch: Batch) -> Tensor:
        """Normalised hidden states [B, T, D], for training.

        Padding follows every sample's own tokens, so it changes nothing at them; only the state after
        the last position would be another one, and it is not used.
        """
        x, _ = self.rwkv(self.embed(batch), scan=self.scan, image_start=self.scan_start(batch))
        return x

    def prefill(self, batch: Batch) -> tuple[Tensor, State]:
        """Hidden states [B, T, D] and the state at each sample's own end, to generate from."""
        x, state = self.rwkv(
            self.embed(batch), scan=self.scan, image_start=self.scan_start(batch), lengths=batch.lengths
        )
        return x, state

    def logits(self, batch: Batch) -> Tensor:
        """Logits at every position, [B, T, V]: for tests and analysis; training uses `forward`."""
        logits: Tensor = self.rwkv.head(self.hidden(batch))
        return logits

    def forward(self, batch: Batch, *, l2: str = "none") -> Answers:
        """Hidden states where a label follows (position t predicts label t + 1), for `loss.lm_loss`.

        l2: where the L2 term acts: "none", "answers" (the rows read anyway), or "all" positions as in
        the original, for which the head runs on every position.
        """
        x = self.hidden(batch)  # [B, T, D]
        labels = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE)  # [B, T]
        asked = asked_for(batch)  # [B, T]
        hidden, targets, every = x.flatten(0, 1), labels.flatten(), None
        if l2 == "all":
            rows, every = torch.arange(len(targets), device=x.device), asked.flatten()  # [B*T]
        else:
            rows = answer_rows(asked) if batch.answers is None else batch.answers  # [M]
            hidden, targets = hidden.index_select(0, rows), targets.index_select(0, rows)
        n_tokens: int | Tensor = batch.ids.numel()
        real = None
        if batch.longest is not None:
            every = asked.flatten().index_select(0, rows)  # [R]
            real = every if l2 != "all" else rows % x.shape[1] < batch.longest
            n_tokens = (len(x) * batch.longest).double()
        return Answers(
            hidden,
            self.rwkv.head.weight,
            targets,
            rows // x.shape[1],
            every,
            asked.sum(dim=1),
            batch.weight,
            n_tokens,
            l2 != "none",
            real,
        )


def encoders(encoder: nn.Module) -> dict[str, nn.Module]:
    """An encoder under its name in the model, or those that a fused one is made of."""
    held = {
        f"encoder.{name}": module
        for name, module in encoder.named_modules()
        if name and isinstance(getattr(module, "learned", None), bool)
    }
    return held or {"encoder": encoder}


def asked_for(batch: Batch) -> Tensor:
    """Whether a label follows the position, in a sample that counts: [B, T]."""
    return (F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE) != IGNORE) & (batch.weight > 0).unsqueeze(1)


def answer_rows(asked: Tensor) -> Tensor:
    """Rows b * T + t that are asked for, [M]; on a GPU this waits for the device."""
    return asked.flatten().nonzero().flatten()


def image_rows(batch: Batch) -> Tensor:
    """Samples with an image, [n_images]; on a GPU this waits for the device."""
    return (batch.image_start != NO_IMAGE).nonzero().flatten()
