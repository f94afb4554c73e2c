"""From settings to a run that is ready for its next step."""

from __future__ import annotations

import copy
import datetime
import functools
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch.utils.data import DataLoader

from alignment.registry import METHODS, parse_align
from alignment.terms import AlignmentContext, AlignmentTerms
from dataset import LatentDataset, StepSampler
from diffusion.interpolant import Interpolant
from loss import Alignment
from models.aligned import AlignedSiT
from models.load import load_sit
from models.sit import SiT, SiTConfig
from models.vae import UNKNOWN_VAE, LatentScale, check_vae, load_vae
from reporting.log import RunLog
from runtime.distributed import allow_tf32, compile_each, run_on_rank0
from runtime.files import full_disk_is_an_error, to_json, write_atomically
from runtime.loading import loading
from runtime.seeding import step_generator
from training.checkpoint import CheckpointWriter, load_checkpoint, make_records
from training.compile_probe import compile_if_possible
from training.config import TrainConfig
from training.ema import EMAUpdater, decays, with_heads
from training.finetune import check_sources, initial_weights, load_init_weights
from training.memory import choose_micro_batch, count_memory, held_bytes
from training.nonfinite import StepGuard
from training.optimizer import make_optimizer
from training.preemption import ignore_signals
from training.run_dir import find_resume_checkpoint, lock_run_dir
from training.settle import device_type, settle


@dataclass
class Run:
    """What training works on."""

    config: TrainConfig  # with every None decided
    accelerator: Accelerator
    store: LatentDataset
    sampler: StepSampler
    loader: DataLoader
    accumulation: int  # micro-batches of a step
    model: torch.nn.Module  # AlignedSiT, wrapped by DDP when there are several processes
    sit: SiT  # the backbone inside `model`
    emas: dict[str, torch.nn.Module]  # by name; grids and methods use the first SiT, "ema"; those of heads beside
    ema_updater: EMAUpdater
    optimizer: torch.optim.Optimizer
    guard: StepGuard
    interpolant: Interpolant
    methods: dict[str, AlignmentTerms]
    vae: torch.nn.Module | None  # decoder of the grids, on rank 0
    state: dict[str, Any]  # what every state.json holds
    writer: CheckpointWriter
    grid_images: int  # as many as fit
    log: RunLog | None  # on rank 0, as the lock
    lock: Any

    @property
    def start(self) -> int:
        """Steps that were done before."""
        return self.sampler.start_step

    @property
    def ema(self) -> SiT:
        return self.emas["ema"]

    @property
    def scale(self) -> LatentScale:
        return self.store.scale

    def alignments(self, step: int) -> dict[str, Alignment]:
        """The alignment terms of the loss at an optimizer step, by name."""
        return {
            term: terms.alignment_at(step) for name, terms in self.methods.items() for term in terms.term_names(name)
        }

    def reading(self) -> str:
        """The samples that were last to be read, in words."""
        step = self.sampler.last_step_issued
        samples = ", ".join(map(str, self.sampler.step_indices(step)[:4]))
        return f" while it reads the samples of step {step + 1} ({samples}, ...) of {self.config.data_dir}"

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and let others use the directory."""
        self.writer.wait()
        if self.lock:
            self.lock.release()


def setup(config: TrainConfig, given: frozenset[str] | None = None) -> Run:
    """Build a run: a new one, or one that is resumed from its newest valid checkpoint.

    Args:
        config: its settings; those that are None are decided here.
        given: names of the settings that the user gave, all unless said; a resumed run takes the others from its
            record.

    Raises:
        ValueError: settings, data, VAE, weights or the run's directory do not fit each other.
    """
    # Where the run stands, as rank 0 sees it: its checkpoint, its settings, its data.
    PartialState(cpu=device_type(config) == "cpu", timeout=datetime.timedelta(seconds=config.timeout))
    checkpoint = run_on_rank0(lambda: find_resume_checkpoint(config))
    config, store, state = settle(config, given, checkpoint)
    accelerator = make_accelerator(config)
    config = compile_if_possible(config, given, accelerator.device)
    vae = load_grid_vae(config, store, accelerator) if config.sampling_steps else None

    # The networks. SiT, EMAs and heads are functions of the seed or of --init-from, until a checkpoint is loaded.
    source = load_sit(config.init_from, format=config.init_format) if config.init_from and not state else None
    sit = build_sit(config, store, source).to(accelerator.device)
    emas = {name: copy.deepcopy(sit).eval().requires_grad_(False) for name in decays(config)}
    methods = build_methods(config, store, sit, emas["ema"], accelerator)
    model = AlignedSiT(sit, make_heads(config, methods)).to(accelerator.device)
    emas, updater = with_heads(emas, sit, {term: model.heads[term] for term in guiding(methods)}, config)
    if config.compile:
        compile_each([*sit.blocks, sit.final_layer, *model.heads.values()])

    # What changes with every step.
    optimizer, guard = make_optimizer_and_guard(config, model, emas, accelerator, checkpoint)

    # What each process reads, in micro-batches that fit.
    heads, guides = functools.partial(make_heads, config, methods), guiding(methods)
    count = functools.partial(count_memory, config, sit.config, heads, accelerator, guides)
    held, found = held_bytes(model, emas, optimizer), state and state["micro_batch"]
    micro_batch = choose_micro_batch(config, accelerator, count, held, found, methods)
    sampler, loader = make_loader(config, store, accelerator, micro_batch, state["step"] if state else 0)
    optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)  # it is where the model is

    # Records: lock, config.json, log, trackers.
    initial = initial_weights(source, state, config, accelerator, sit.config.latent_size)
    record, state = make_records(config, store, initial, check_sources(config, state), micro_batch)
    return Run(
        config,
        accelerator,
        store,
        sampler,
        loader,
        sampler.accumulation,
        accelerator.prepare(model),
        sit,
        emas,
        updater,
        optimizer,
        guard,
        Interpolant(config.path_type, config.prediction),
        methods,
        vae,
        state,
        CheckpointWriter(
            config.run_dir, config.keep_last, config.keep_every, config.checkpointing_steps, config.timeout
        ),
        config.sampling_count,
        *start_records(config, record, sampler.start_step, accelerator),
    )


def make_optimizer_and_guard(
    config: TrainConfig,
    model: AlignedSiT,
    emas: dict[str, torch.nn.Module],
    accelerator: Accelerator,
    checkpoint: Path | None,
) -> tuple[torch.optim.Optimizer, StepGuard]:
    """Both as they are before the next step; with a checkpoint its values are put into networks and EMAs, too."""
    optimizer = make_optimizer(config, model.parameters())
    terms = ["loss", "velocity", *(f"align_{term}" for term in model.heads), "grad_norm"]
    guard = StepGuard(terms, accelerator.device, config.spike_factor, config.skip_spikes)
    if checkpoint:
        guard.load_state_dict(load_checkpoint(checkpoint, model, emas, optimizer, accelerator.scaler, verify=False))
        accelerator.print(f"resuming from {checkpoint}")
    return optimizer, guard


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Devices, processes, precision and trackers, by accelerate.

    Raises:
        ValueError: the launcher (`accelerate config`, or its environment) has set what this trainer does not support.
    """
    set_by_launcher = {
        "ACCELERATE_DYNAMO_BACKEND": ("no", "use --compile"),
        "ACCELERATE_USE_FSDP": ("false", "use --zero1"),
        "ACCELERATE_USE_DEEPSPEED": ("false", "use --zero1"),
        "ACCELERATE_USE_MEGATRON_LM": ("false", "leave it out"),
    }
    for name, (expected, fix) in set_by_launcher.items():
        found = os.environ.get(name, expected)
        if found.lower() not in (expected, "0", ""):
            raise ValueError(f"expected accelerate to be configured without it, found {name}={found}; {fix}")
    allow_tf32(config.allow_tf32)
    # Buffers are constants. (torch 2.6, which we support, does not know the newer name of this argument.)
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    return Accelerator(
        cpu=device_type(config) == "cpu",  # else it does not join the processes that torchrun starts on CPUs
        mixed_precision=config.mixed_precision,
        # Micro-batches are counted here: an inherited environment variable must not divide the loss once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.run_dir,
        kwargs_handlers=[ddp],
    )


def make_loader(
    config: TrainConfig, store: LatentDataset, accelerator: Accelerator, micro_batch: dict[str, Any], start: int
) -> tuple[StepSampler, DataLoader]:
    """The order of this rank's micro-batches from step `start` on, and their DataLoader."""
    sampler = StepSampler(
        len(store),
        config.batch_size,
        config.seed,
        accelerator.process_index,
        accelerator.num_processes,
        micro_batch["micro_batches"],
        start_step=start,
        flip=config.random_flip,
    )
    loader = DataLoader(
        store,
        batch_sampler=sampler,
        collate_fn=dict,  # the store gathers a batch at once: nothing is left to collate
        pin_memory=accelerator.device.type == "cuda",
        **loading(config.num_workers, ignore_signals),
    )
    return sampler, loader


def load_grid_vae(config: TrainConfig, store: LatentDataset, accelerator: Accelerator) -> torch.nn.Module | None:
    """The decoder of the grids, on rank 0 alone; refused if it is not the VAE that made the store."""
    if not accelerator.is_main_process:
        return None
    vae = load_vae(config.vae, accelerator.device)
    if store.meta["vae_digest"] == UNKNOWN_VAE:
        print(f"{config.data_dir} does not say which VAE made it: taking {config.vae}", flush=True)
    check_vae(vae, config.vae, store.meta["vae_digest"], f"the store {config.data_dir} ({store.meta['vae']})")
    return vae


def build_methods(
    config: TrainConfig, store: LatentDataset, sit: SiT, ema: SiT, accelerator: Accelerator
) -> dict[str, AlignmentTerms]:
    """The terms of the loss that `--align` names, by method."""
    context = AlignmentContext(
        settings=config,
        sit=sit,
        ema=ema,
        interpolant=Interpolant(config.path_type),
        device=accelerator.device,
        autocast=accelerator.autocast,
        steps_per_epoch=len(store) / config.batch_size,
        resolution=config.resolution,
        micro_batch=config.batch_size // accelerator.num_processes // config.gradient_accumulation_steps,
        compile=config.compile,
    )
    return {name: METHODS[name].build(context) for name in parse_align(config.align)}


def build_sit(config: TrainConfig, store: LatentDataset, source: tuple[SiT, dict] | None) -> SiT:
    """The SiT before the first step: a function of the seed, whatever is aligned, or the weights of `source`, as
    `load_sit` gives it."""
    channels, height, width = store.latent_shape
    if height != width:
        raise ValueError(f"expected square latents, found {height} x {width} in {config.data_dir}")
    torch.manual_seed(config.seed)
    sit = SiT(SiTConfig.from_name(config.model, height, channels, config.num_classes, config.qk_norm))
    sit.checkpoint_every = config.grad_checkpoint
    if source is not None:
        load_init_weights(config, sit, *source, store.scale, store.class_names)
    return sit


def make_heads(config: TrainConfig, methods: dict[str, AlignmentTerms]) -> dict[str, tuple[tuple, torch.nn.Module]]:
    """Head of each term of the loss, by name, behind the depths of what it takes; its weights depend on seed and
    name alone."""
    heads = {}
    for name, terms in methods.items():
        for term, depth in terms.term_names(name).items():
            torch.manual_seed(step_generator(config.seed, 0, f"head {term}").initial_seed())
            heads[term] = ((depth, *terms.also), terms.make_head())
    return heads


def guiding(methods: dict[str, AlignmentTerms]) -> list[str]:
    """The terms whose heads can guide sampling: they have EMAs."""
    return [term for name in methods if METHODS[name].guides for term in methods[name].term_names(name)]


def start_records(
    config: TrainConfig, record: dict[str, Any], start: int, accelerator: Accelerator
) -> tuple[RunLog | None, Any]:
    """Lock the directory, write `config.json`, open log and trackers; gives log and lock on rank 0."""
    lock = log = None
    if accelerator.is_main_process:
        lock = lock_run_dir(config.run_dir)
        with full_disk_is_an_error(config.run_dir):
            write_atomically(config.run_dir / "config.json", to_json(record))
            log = RunLog(config.run_dir, start)
    try:
        accelerator.init_trackers(
            config.tracker_project,
            {name: str(value) for name, value in record["config"].items()},
            {
                "wandb": {"name": config.run_dir.name, "dir": str(config.run_dir), "id": record["tracker_run"]}
                | {"resume": "allow"},
                "tensorboard": {"purge_step": start + 1},  # steps that are done again are shown once
            },
        )
    except Exception as error:  # each tracker has its own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--report-to {config.report_to}: cannot start it ({reason}); log in, or leave it out"
        ) from error
    return log, lock
