"""A plan as a table, and as JSON."""

from typing import Any

from dft_lightning.callbacks.run_summary import show
from dft_lightning.errors import printable
from dft_lightning.planning.dealt import Dealing
from dft_lightning.planning.memory import GIB
from dft_lightning.planning.plan import Plan


def print_plan(plan: Plan) -> None:
    """The table, and in the last line whether it fits."""
    show(facts(plan), "The plan")
    print(verdict(plan))


def facts(plan: Plan) -> dict[str, str]:
    """The rows of the table."""
    place, work, options = plan.place, plan.work, plan.options
    dtype = str(plan.dtype).removeprefix("torch.")
    named = {
        "model": f"{printable(plan.model)}, "
        f"{plan.trained / 1e6:,.1f} M of {plan.parameters / 1e6:,.1f} M parameters trained",
        "precision": f"{options.precision}, weights in {dtype}" + ", beside adapters in 4 bits" * plan.four_bits,
        "devices": f"{place.devices} × {place.name} with {place.capacity / GIB:,.1f} GiB{_dealt(options.dealing)}",
        "data": printable(work.source),
        "largest micro-batch": _shape(plan),
        "step": f"{work.micro_batches} micro-batches a device; {work.tokens:,.0f} tokens over all devices, of which "
        f"{work.supervised:,.0f} supervised",
        "FLOPs a step": f"not known: {plan.unknown}" if work.flops is None else f"{work.flops:.4g}",
        "recomputation": plan.kind,
    }
    named |= {
        f"memory: {name}": f"{size / GIB:,.2f} GiB" for name, size in plan.memory.parts().items() if size > 0.005 * GIB
    }
    named["memory: peak"] = f"{plan.memory.peak / GIB:,.2f} GiB (not all parts are there at the same moment)"
    if plan.moved is not None:
        named["moved to a device"] = f"{plan.moved / GIB:,.2f} GiB a step, layers beside computing"
    return named | {"time, an estimate": _time(plan)}


def _dealt(dealing: Dealing | None) -> str:
    if dealing is None:
        return ""
    copies = "" if dealing.copies == 1 else f", {dealing.copies} times"
    computed = "" if dealing.compute is None else f"; computed in {str(dealing.compute).removeprefix('torch.')}"
    return f"; weights, gradients and states dealt over {dealing.shards}{copies}{computed}"


def _shape(plan: Plan) -> str:
    shape = plan.work.largest
    wide = shape.width or max(map(sum, shape.rows))
    return f"{len(shape.rows)} rows of {wide:,} positions, at most {shape.supervised:,} supervised"


def _time(plan: Plan) -> str:
    if plan.seconds is None or plan.peak is None:
        return f"not known: {plan.unknown or f'no peak of {plan.place.name}; give --throughput.peak_flops'}"
    steps = plan.work.steps
    whole = "" if steps is None else f", {plan.seconds * steps / 3600:,.2f} h for {steps:,} steps"
    return (
        f"{plan.seconds:,.3g} s a step{whole}, at {plan.options.utilisation:.0%} (--utilisation) of "
        f"{plan.peak / 1e12:,.4g} TFLOP/s a device; validation and saving come on top"
    )


def verdict(plan: Plan) -> str:
    """The last line."""
    assumed = " (by assumed rows: see data)" if plan.work.source.startswith("assumed") else ""
    return _fit(plan) + assumed


def _fit(plan: Plan) -> str:
    need, there = plan.memory.peak / GIB, plan.place.capacity / GIB
    if plan.fits:
        return f"fits: {need:,.1f} of {there:,.1f} GiB"
    if plan.advice is None or plan.advised is None:
        return f"does not fit: {need:,.1f} of {there:,.1f} GiB, and no setting was found that does"
    return f"does not fit: {need:,.1f} of {there:,.1f} GiB; set {plan.advice} ({plan.advised.peak / GIB:,.1f} GiB)"


def as_json(plan: Plan) -> dict[str, Any]:
    """All figures, in bytes, seconds and FLOPs."""
    work = plan.work
    return {
        "model": plan.model,
        "parameters": plan.parameters,
        "trained_parameters": plan.trained,
        "precision": plan.options.precision,
        "devices": plan.place.devices,
        "device": plan.place.name,
        "shards": 1 if plan.options.dealing is None else plan.options.dealing.shards,
        "moved_a_step": plan.moved,
        "capacity": plan.place.capacity,
        "source": work.source,
        "micro_batches": work.micro_batches,
        "largest_micro_batch": [list(row) for row in work.largest.rows],
        "tokens_a_step": work.tokens,
        "supervised_tokens_a_step": work.supervised,
        "flops_a_step": work.flops,
        "steps": work.steps,
        "activation_checkpointing": plan.kind,
        "memory": plan.memory.parts(),
        "peak_memory": plan.memory.peak,
        "fits": plan.fits,
        "advice": plan.advice,
        "peak_flops": plan.peak,
        "utilisation": plan.options.utilisation,
        "seconds_a_step": plan.seconds,
    }
