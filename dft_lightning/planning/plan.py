"""A run's need of memory and time on given devices, and the setting that fits if its own does not."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from dft_lightning.attention import refuse_attention
from dft_lightning.compilation import refuse_changing_shapes
from dft_lightning.data_weights import check_data_weights
from dft_lightning.embedding_rows import config_with_rows, prepare_source
from dft_lightning.errors import UserError
from dft_lightning.loss_terms import refuse_unsupported, wants_router_loss
from dft_lightning.models import LoRA, WeightedLM
from dft_lightning.planning.dealt import Dealing
from dft_lightning.planning.flops import ModelFlops, NotCountedError, model_flops
from dft_lightning.planning.memory import KINDS, Load, Memory, memory, sound, targets_of
from dft_lightning.planning.peaks import Device, product_of
from dft_lightning.planning.rehearsal import MicroBatch
from dft_lightning.planning.work import Work, work_of
from dft_lightning.precision import refuse_logits, weights_dtype
from dft_lightning.recomputation import Recomputation, changes_products, refuse_selective
from dft_lightning.row_limits import check_limits
from dft_lightning.shapes import run_in_shapes

if TYPE_CHECKING:
    from dft_lightning.data import ChatDataModule
    from dft_lightning.module import FineTuner


@dataclass(frozen=True)
class Place:
    """The devices of a run.

    Args:
        name: of one.
        known: what the table has of it.
        cuda: whether they are GPUs.
        devices: how many there are.
        capacity: bytes of one.
        peak_flops: FLOP/s of one, as the user gives it.
    """

    name: str
    known: Device | None
    cuda: bool
    devices: int
    capacity: int
    peak_flops: float | None

    def peak(self, precision: str, dtype: torch.dtype) -> float | None:
        """FLOP/s of one device in a precision, where known."""
        product = product_of(precision, dtype)
        if self.peak_flops is not None or self.known is None or product is None:
            return self.peak_flops
        return self.known.peak(product)


@dataclass(frozen=True)
class Options:
    """What of the trainer's options counts.

    Args:
        precision: in full, as bf16-mixed.
        limits: world_size, global_rank, max_epochs, max_steps.
        utilisation: share of the peak that is expected.
        dealing: how the model is dealt out over the ranks; None where each has all of it.
        averaged: as `Load.averaged`.
    """

    precision: str
    limits: SimpleNamespace
    utilisation: float
    dealing: Dealing | None = None
    averaged: bool = False


@dataclass(frozen=True)
class Plan:
    """What is printed.

    Args:
        parameters: of the model; trained: of these.
        kind: the recomputation in force.
        memory: what a device needs.
        advice: options that would fit, where its own do not; None where none was found.
        advised: what a device needs then.
        peak: FLOP/s of a device, where known.
        unknown: why no FLOPs are known.
        four_bits: whether weights beside adapters are held in 4 bits.
        moved: bytes that come to a device in a step, where the model is dealt out.
    """

    model: str
    dtype: torch.dtype
    options: Options
    place: Place
    parameters: int
    trained: int
    work: Work
    kind: Recomputation
    memory: Memory
    advice: str | None
    advised: Memory | None
    peak: float | None
    unknown: str
    four_bits: bool
    moved: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the device has the memory."""
        return self.memory.peak <= self.place.capacity

    @property
    def seconds(self) -> float | None:
        """An estimate of a step's time: its FLOPs at the expected utilisation."""
        if self.work.flops is None or self.peak is None:
            return None
        return self.work.flops / (self.peak * self.options.utilisation * self.place.devices)


def make_plan(module: "FineTuner", data: "ChatDataModule", config: Any, place: Place, options: Options) -> Plan:
    """Plan a fit of the module on the data."""
    prepare_source(module)
    dtype = weights_dtype(module.dtype_choice, options.precision)
    load = Load(
        config=config_with_rows(config, module.source.embedding_rows),
        lora=module.lora,
        dtype=dtype,
        precision=options.precision,
        attention=module.source.attn_implementation,
        optimizer=module.optimization.make,
        muon_adamw=module.optimization.muon_adamw,
        freezing=module.freezing,
        shape=MicroBatch.full(1, 1),
        accumulates=False,
        ranks=place.devices,
        cuda=place.cuda,
        capacity=place.capacity,
        chunk_rows=module.chunk_rows,
        logits=module.logits,
        together=module.weighting.scope == "sequence",
        compared=module.reference_in_force == "copy",
        targets=targets_of(module.weighting),
        dealing=options.dealing,
        four_bits=module.source.quantization is not None,
        embeddings_trained=module.resize_embeddings is not False,
        router=wants_router_loss(config, module.router_loss),
        averaged=options.averaged,
    )
    refuse_unsupported(config, module.unsupported_losses)
    refuse_logits(module.logits, load.products, options.precision)
    refuse_attention(load.attention)
    if module.compile_layers:
        refuse_changing_shapes(data)
    data.fixed_shape = module.compile_layers
    network = replace(load, four_bits=False).network()  # two weights in 4 bits would count as one
    flops, unknown = _flops(network)
    work = work_of(data, lambda: module.tokenizer, options.limits, flops)
    check_data_weights(module.weighting, data, "fit")
    check_limits(module, data)
    load = replace(load, shape=work.largest, accumulates=work.micro_batches > 1)
    kind, need = _in_force(module, load)
    merges = module.adapter == "merge"
    advice, advised = (None, None) if need.peak <= place.capacity else _advice(load, kind, data.options, merges)
    if advice is not None and "bf16-true" in advice and module.dtype_choice != "auto":
        advice += " --model.dtype auto"  # the two would contradict each other
    parameters = list(network.parameters())
    return Plan(
        model=module.source.name,
        dtype=dtype,
        options=options,
        place=place,
        parameters=sum(parameter.numel() for parameter in parameters),
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        work=work,
        kind=kind,
        memory=need,
        advice=advice,
        advised=advised,
        peak=place.peak(options.precision, load.products),
        unknown=unknown,
        four_bits=load.four_bits,
        moved=None if load.dealing is None else load.dealing.moved(network, work.micro_batches),
    )


def _flops(network: WeightedLM) -> tuple[ModelFlops | None, str]:
    try:
        return model_flops(network), ""
    except NotCountedError as reason:
        return None, str(reason)


def _in_force(module: "FineTuner", load: Load) -> tuple[Recomputation, Memory]:
    """The recomputation that the module asks for, and what a device then needs."""
    asked: str = module.activation_checkpointing
    kinds = sound(load) if asked == "auto" else tuple(kind for kind in KINDS if kind == asked)
    if asked == "selective" and asked not in sound(load):
        network = load.network()
        refuse_selective(network.decoder, changes_products(lambda: run_in_shapes(network.decoder)))
    for kind in kinds:
        need = memory(load, kind)
        if need.peak <= load.capacity:
            break
    return kind, need


def _advice(load: Load, kind: Recomputation, data: SimpleNamespace, merges: bool) -> tuple[str | None, Memory | None]:
    """The first of the lighter settings that fits, as options, and what a device then needs.

    Args:
        merges: whether an adapter is merged before the training, which 4 bits do not go with.
    """
    kinds = {*sound(load), kind}
    for options, lighter, other in _lighter(load, kind, data):
        if lighter.four_bits and not load.four_bits and (merges or (load.lora and load.lora.modules_to_save)):
            continue
        if other not in kinds:
            continue
        try:
            need = memory(lighter, other)
        except UserError:  # this model does not support it
            continue
        if need.peak <= load.capacity:
            return options, need
    return None, None


def _lighter(load: Load, kind: Recomputation, data: SimpleNamespace) -> Iterator[tuple[str, Load, Recomputation]]:
    """Settings that need less, from the one that costs least: options, load, recomputation."""
    given = _fused(load)
    if given:
        load = replace(load, fused=True)
        yield given.strip(), load, kind
    if _can_be_dealt(load):
        load, given = replace(load, dealing=Dealing(load.ranks)), f"{given}--trainer.strategy fsdp2 "
        yield given.strip(), load, kind
    for other in KINDS[KINDS.index(kind) + 1 :]:
        yield f"{given}--model.activation_checkpointing {other}", load, other
    full, rows, smaller = f"{given}--model.activation_checkpointing full", data.micro_batch_size, load
    while rows > 1:
        rows //= 2
        smaller = replace(load, shape=_fewer(load.shape, rows, data), accumulates=True)
        yield f"{full} --data.micro_batch_size {rows}", smaller, "full"
    if load.dtype == torch.float32:
        fewer = f" --data.micro_batch_size {rows}" if rows < data.micro_batch_size else ""
        half = replace(smaller, dtype=torch.bfloat16, precision="bf16-true")
        yield f"{full}{fewer} --trainer.precision bf16-true", half, "full"
    if load.lora is None:
        for other in KINDS[KINDS.index(kind) :]:
            added = "" if other == kind else f" --model.activation_checkpointing {other}"
            yield f"{given}--model.lora.rank 8{added}", replace(load, lora=LoRA()), other
    possible = load.dealing is None and not load.embeddings_trained and not (load.lora and load.lora.dora)
    if not load.four_bits and possible:
        adapters = "" if load.lora else "--model.lora.rank 8 "
        four = replace(load, lora=load.lora or LoRA(), four_bits=True)
        yield f"{full} {adapters}--model.quantization nf4", four, "full"


def _can_be_dealt(load: Load) -> bool:
    """Whether each rank has all, and fsdp2 would not refuse the run."""
    refused = load.precision == "16-mixed" or load.four_bits or (load.lora is not None and load.lora.dora)
    return load.ranks > 1 and load.dealing is None and not refused and not load.averaged


def _fused(load: Load) -> str:
    """The option by which the optimizer's step would hold nothing beside, where it has one."""
    known = load.optimizer([torch.nn.Parameter(torch.zeros(1, 1))]).defaults
    possible = load.cuda and known.get("fused", True) is None and load.precision != "16-mixed"
    return "--model.optimizer.fused true " if possible else ""


def _fewer(shape: MicroBatch, rows: int, data: SimpleNamespace) -> MicroBatch:
    """The shape with so many rows at most; of a row without padding, so much of its length."""
    if data.packing == "padding_free":
        width = (data.pack_length or data.max_length) * rows
        kept: list[int] = []
        for length in shape.rows[0]:
            if sum(kept) + length <= width:
                kept.append(length)
        share = sum(kept) / max(sum(shape.rows[0]), 1)
        return replace(shape, rows=(tuple(kept),), supervised=int(shape.supervised * share), width=None)
    kept_rows = shape.rows[:rows]
    return replace(shape, rows=kept_rows, supervised=min(shape.supervised, sum(map(sum, kept_rows))))
