"""What a device has to hold while a model is trained, by part, and the lightest recomputation with which it fits."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dft_lightning.attention import implementation_of
from dft_lightning.averaging import held_bytes
from dft_lightning.embedding_rows import train_embeddings
from dft_lightning.freezing import NOTHING, Freezing
from dft_lightning.logprob.products import allowed_bytes, default_rows
from dft_lightning.models import LoRA, WeightedLM
from dft_lightning.optimizers import MuonAdamW, Optimization
from dft_lightning.parameter_groups import kinds_of
from dft_lightning.planning.dealt import Dealing
from dft_lightning.planning.live_bytes import nbytes
from dft_lightning.planning.rehearsal import Footprint, MicroBatch, Setting, rehearse, skeleton
from dft_lightning.recomputation import Recomputation, changes_products
from dft_lightning.shapes import run_in_shapes
from dft_lightning.weighting import TokenWeighting
from dft_lightning.weighting.base import REF_DISTRIBUTION

GIB = 2**30
#: What a CUDA context and the allocator's gaps take, beside the tensors: an assumption.
_RESERVE = 1.5 * GIB
#: On a CPU the gaps that malloc leaves, as a share of the micro-batch's tensors: between 10 % and 45 % were measured.
_GAPS = 0.25
_TRUE = {torch.bfloat16: "bf16-true"}
KINDS: tuple[Recomputation, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Load:
    """What a device is to do.

    Args:
        config: the transformers model's configuration.
        lora: adapters, if only these are trained.
        dtype: of the weights.
        precision: as `trainer.precision`, in full.
        attention: as `model.attn_implementation`.
        optimizer: makes the optimizer of a list of parameters.
        shape: the largest micro-batch.
        accumulates: whether a step has several micro-batches.
        ranks: data-parallel devices.
        cuda: whether these are GPUs.
        capacity: bytes of each.
        chunk_rows: as `model.chunk_rows`.
        logits: as `model.logits`.
        together: whether whole sequences are weighed together, so that the loss keeps their rows.
        fused: whether the optimizer's step is one kernel, whatever `optimizer` says.
        compared: whether a frozen copy of the model is held as the reference.
        targets: 1 where the weighting has targets over the vocabulary, 2 where these want the reference's logits, too.
        dealing: how the model is dealt out over the ranks; None where each has all of it.
        four_bits: whether weights beside adapters are held in 4 bits.
        embeddings_trained: whether embedding and head are trained next to adapters.
        router: whether there is a router loss.
        muon_adamw: as `model.muon_adamw`.
        freezing: what of the model is not trained.
        averaged: whether a callback holds averages of the trained weights on the device.
    """

    config: Any
    lora: LoRA | None
    dtype: torch.dtype
    precision: str
    attention: str | None
    optimizer: Callable[[Any], Optimizer]
    shape: MicroBatch
    accumulates: bool
    ranks: int
    cuda: bool
    capacity: int
    chunk_rows: int | None = None
    logits: str = "float32"
    together: bool = False
    fused: bool = False
    compared: bool = False
    targets: int = 0
    dealing: Dealing | None = None
    four_bits: bool = False
    embeddings_trained: bool = False
    router: bool = False
    muon_adamw: MuonAdamW | None = None
    freezing: Freezing = NOTHING
    averaged: bool = False

    @property
    def products(self) -> torch.dtype:
        """What the weights come in to the products."""
        return (None if self.dealing is None else self.dealing.compute) or self.dtype

    def part(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes that a device holds of them."""
        return nbytes(parameters) if self.dealing is None else self.dealing.part(parameters)

    def network(self) -> WeightedLM:
        """The model without its weights."""
        model = skeleton(self.config, self.lora, self.dtype, self.precision, self.attention, self.four_bits)
        return WeightedLM(self.freezing.apply(train_embeddings(model) if self.embeddings_trained else model))


@dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Args:
        held: by name, what is there all the time.
        gradients: of the trained weights.
        accumulates: whether they are there while a micro-batch runs, or come as its activations go.
        micro_batch: what forward and backward pass hold beside.
        update: what the optimizer's step holds beside.
    """

    held: dict[str, int]
    gradients: int
    accumulates: bool
    micro_batch: Footprint
    update: int

    @property
    def peak(self) -> int:
        """Most that there is at once."""
        running = self.micro_batch.peak + (self.gradients if self.accumulates else 0)
        return sum(self.held.values()) + max(running, self.gradients + self.update)

    def parts(self) -> dict[str, int]:
        """By name; they are not all there at the same moment."""
        run = self.micro_batch
        return self.held | {
            "gradients": self.gradients,
            "saved activations": run.saved,
            "loss head": run.head,
            "backward pass, beyond these": max(0, run.peak - run.saved - run.head),
            "optimizer's step": self.update,
        }


def targets_of(weighting: TokenWeighting) -> int:
    """As `Load.targets`."""
    return weighting.vocabulary * (1 + (REF_DISTRIBUTION in weighting.needs))


def sound(load: Load) -> tuple[Recomputation, ...]:
    """The kinds of recomputation with which the model's gradients are right, as far as its shapes tell."""
    network = load.network()
    try:
        changed = changes_products(lambda: run_in_shapes(network.decoder))
    except Exception:  # the family's code looks at values: the fit will tell
        changed = ""
    return tuple(kind for kind in KINDS if kind != "selective" or not changed)


def lightest(
    load: Load, kinds: Iterable[Recomputation] | None = None
) -> tuple[Recomputation | None, dict[str, Memory]]:
    """The first kind of recomputation with which the load fits its device (None if none does), and what each needs.

    Kinds after the first that fits are not looked at.

    Args:
        kinds: all that are sound by default.
    """
    looked: dict[str, Memory] = {}
    for kind in sound(load) if kinds is None else kinds:
        looked[kind] = memory(load, kind)
        if looked[kind].peak <= load.capacity:
            return kind, looked
    return None, looked


def memory(load: Load, kind: Recomputation) -> Memory:
    """What a device has to hold with a kind of recomputation."""
    network = load.network()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    gradients = load.part(trained)
    states, update = _optimizer(load, network)
    held = {"weights": load.part(network.parameters()), "buffers": nbytes(network.buffers())}
    held |= {"optimizer states": states}
    if load.averaged:
        held["averages of the trained weights"] = sum(held_bytes(weight) for weight in trained)
    held |= _because_of_ranks(load, network, gradients)
    if load.cuda:
        held["CUDA context and gaps (assumed)"] = int(_RESERVE)
    accumulates = load.accumulates or load.dealing is not None  # a part of them stays, the whole is counted beside
    setting = Setting(
        dtype=load.products,
        precision=load.precision if load.products == load.dtype else _TRUE[load.products],
        attention=implementation_of(network.decoder) if load.attention is None else load.attention,
        recomputation=kind,
        cuda=load.cuda,
        chunk_rows=load.chunk_rows or _chunk_rows(load, network, sum(held.values()) + gradients),
        accumulates=accumulates,
        narrow_logits=load.logits == "bfloat16",
        together=load.together,
        targets=load.targets,
        four_bits=load.four_bits,
        embeddings_trained=load.embeddings_trained,
        router=load.router,
        freezing=load.freezing,
    )
    run = rehearse(load.config, load.lora, load.shape, setting)
    if not load.cuda:
        held["gaps of the allocator (assumed)"] = int(_GAPS * run.peak)
    return Memory(held, gradients, accumulates, run, update)


def _because_of_ranks(load: Load, network: WeightedLM, gradients: int) -> dict[str, int]:
    """What a device holds of other ranks' parts, and of a frozen copy, by name."""
    found: dict[str, int] = {}
    copied = network if load.compared else None  # adapters included
    if copied is not None:
        found["frozen copy of the initial model"] = load.part(copied.parameters())
    if load.dealing is not None:
        found["gathered weights and their gradients"] = load.dealing.whole(network)
        if load.accumulates and load.dealing.once_a_step:
            found["gradients that wait for the step's last micro-batch"] = load.dealing.waiting(network)
        if copied is not None:
            found["gathered weights of the copy"] = load.dealing.around(copied)
    elif load.ranks > 1:
        found["buckets of DistributedDataParallel"] = gradients
    return found


def _chunk_rows(load: Load, network: WeightedLM, taken: int) -> int:
    """As `logprob` chooses them; where rows of a sequence are kept, as many as may be."""
    vocabulary = network.base.get_output_embeddings().weight.shape[0]
    narrow = load.logits == "bfloat16"
    size = (2 + 4 * (load.together and not load.targets)) if narrow else 4
    size *= 1 + load.targets
    if not load.cuda:
        return default_rows(torch.device("cpu"), vocabulary, size=size, kept=load.together)
    allowed: int = min(allowed_bytes("cuda", kept=load.together), max(load.capacity - taken, 0) // 4)
    rows: int = allowed // (size * vocabulary) // 128 * 128
    return max(128, rows)


def _optimizer(load: Load, network: WeightedLM) -> tuple[int, int]:
    """Bytes of the optimizer's states, and those that its step takes for a moment, measured on small parameters."""
    optimization, kinds = Optimization(load.optimizer, load.muon_adamw), kinds_of(network.model)
    alike: dict[tuple[torch.dtype, bool, bool], list[nn.Parameter]] = {}
    for parameter in filter(lambda each: each.requires_grad, network.parameters()):
        key = parameter.dtype, kinds[parameter] == "matrix", parameter.dim() == 1
        alike.setdefault(key, []).append(parameter)
    states, update = 0.0, 0
    for (dtype, is_matrix, is_flat), parameters in alike.items():
        small = nn.Parameter(torch.zeros(256 * 256 if is_flat else (256, 256), dtype=dtype))
        small.grad = torch.zeros_like(small)
        optimizer = optimization.over(small, "matrix" if is_matrix else "other")
        optimizer.step()
        made = nbytes(value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
        states += made / nbytes([small]) * load.part(parameters)
        defaults = optimizer.defaults
        plain = load.cuda and not load.fused and not defaults.get("fused")
        if plain and "foreach" in defaults and defaults["foreach"] is not False:
            update += load.part(parameters)
    return int(states), update
