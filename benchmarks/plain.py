"""The training loop that the fast one is measured against, as this family of codebases writes it.

The same model, head, data and kinds of draws, without our optimizations: eager, float16 by autocast with a scaler on a
GPU, unfused AdamW, an EMA updated tensor by tensor, a loss that loops over the batch, three numbers read in each step.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from models.aligned import AlignedSiT
from models.sit import patchify


class PlainLoop:
    """Trains `model` in place, on its device."""

    def __init__(self, model: AlignedSiT):
        self.model, self.ema = model, copy.deepcopy(model.sit).requires_grad_(False)
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.0, foreach=False, fused=False)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.device.type == "cuda")

    def loss(self, f_sit: torch.Tensor, f_vae: torch.Tensor) -> torch.Tensor:
        total = 0.0
        for ours, target in zip(f_sit, f_vae, strict=True):
            total = total + F.smooth_l1_loss(ours, target, beta=0.05)
        return total / len(f_sit)

    def update_ema(self) -> None:
        weights = dict(self.model.sit.named_parameters())
        for name, ema in self.ema.named_parameters():
            ema.data.mul_(0.9999).add_(weights[name].data, alpha=1 - 0.9999)

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        device, label = self.device, batch["label"]
        mean, std = batch["moments"].chunk(2, dim=1)
        z = mean + std * torch.randn_like(mean)
        t = torch.rand(len(z), 1, 1, 1, device=device)
        eps = torch.randn_like(z)
        y = torch.where(torch.rand(len(z), device=device) < 0.1, self.model.sit.config.num_classes, label)
        with torch.autocast(device.type, torch.float16, enabled=self.scaler.is_enabled()):
            velocity, projected = self.model((1 - t) * z + t * eps, t.flatten(), y)
            denoising = ((velocity - (eps - z)) ** 2).mean()
            alignment = torch.zeros((), device=device)
            if projected:
                alignment = self.loss(projected["vae"], patchify(z, self.model.sit.config.patch_size))
        self.scaler.scale(denoising + alignment).backward()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=False)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.update_ema()
        denoising.item(), alignment.item(), norm.item()
