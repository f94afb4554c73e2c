"""What a run says of itself before its first step: what is trained, which settings do nothing, what looks wrong."""

from __future__ import annotations

import warnings

import torch

from alignment.registry import METHODS, parse_align
from models.load import has_null_class
from runtime.seeding import block_generator
from training.config import settings_by
from training.setup import Run


def warn_of_settings(run: Run, given: frozenset[str]) -> None:
    """Say which settings do nothing."""
    config, names = run.config, parse_align(run.config.align)
    if "enc_type" in given and "repa" in names:
        print(f"--enc-type: REPA is trained (--align {config.align})", flush=True)
    for method in METHODS:
        unused = sorted(given & settings_by(group=f"alignment: {method}"))
        if method not in names and unused:
            flags = ", ".join("--" + name.replace("_", "-") for name in unused)
            warnings.warn(f"{flags} does nothing: --align {config.align} has no {method}", stacklevel=2)
    if config.sampling_steps and not has_null_class(run.state) and config.sampling_guidance != 1:
        warnings.warn(
            "grids are drawn without guidance: with --label-dropout 0 the null class is not trained", stacklevel=2
        )
    if run.start >= config.max_train_steps:
        warnings.warn(f"the run is at step {run.start} already: nothing is left of --max-train-steps", stacklevel=2)


def warn_of_scale(run: Run) -> None:
    """Warn if the std of the scaled latents is far from 1, which the path to standard normal noise supposes."""
    store = run.store
    moments = store.__getitems__(list(range(0, len(store), max(1, len(store) // 256))))["moments"]
    mean, std = moments.chunk(2, dim=1)
    generator = block_generator(run.config.seed, 0, "scale check")
    found = run.scale.scale_latent(mean + std * torch.randn(mean.shape, generator=generator)).std().item()
    if not 0.5 < found < 2:
        warnings.warn(
            f"expected scaled latents with a std near 1, found {found:.3g} in {run.config.data_dir}; "
            f"dump them again with --scale auto"
            + (", or align by --align-normalize sample" if "vae" in parse_align(run.config.align) else ""),
            stacklevel=2,
        )


def describe(run: Run) -> str:
    """What is about to be trained, in a few lines."""
    config, store, processes = run.config, run.store, run.accelerator.num_processes

    def millions(module: torch.nn.Module) -> str:
        return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f}M"

    heads = run.accelerator.unwrap_model(run.model).heads
    micro_batch = config.batch_size // processes // run.accumulation
    lines = [
        f"run      {config.run_dir}",
        f"data     {config.data_dir}: {len(store):,} images, {store.num_classes} classes, latents {store.latent_shape}",
        f"model    {config.model} {millions(run.sit)} parameters, path {config.path_type}",
        f"batch    {config.batch_size} = {processes} processes x {run.accumulation} micro-batches "
        f"x {micro_batch}; {len(store) / config.batch_size:.1f} steps an epoch",
        f"device   {run.accelerator.device}, precision {config.mixed_precision}, "
        f"{'compiled' if config.compile else 'not compiled'}",
    ]
    lines += [
        f"align    {term}: block {depth}, head {millions(heads[term])} parameters, "
        f"{terms.alignment.objective}, weight {terms.alignment.weight / len(terms.depths):g}"
        for name, terms in run.methods.items()
        for term, depth in terms.term_names(name).items()
    ]
    return "\n".join(lines)
