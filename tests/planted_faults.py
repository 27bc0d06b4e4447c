"""Plants known faults, one at a time, in a copy of the package, and shows that the tests named for each turn red.

Run `python tests/planted_faults.py [word …]` (a word chooses the faults that have it in their line). Each fault is one
that a widely used trainer had. It leaves with 1 if a fault stays green, or if the tests fail without any fault.
"""

# ruff: noqa: E501 - a table

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]

MODULE, NLL, BATCH = "tests/test_module.py::", "tests/logprob/test_weighted_nll.py::", "tests/data/test_batch.py::"
STEPS, STEP_WEIGHTS, NONFINITE = (
    "tests/data/test_steps.py::",
    "tests/test_step_weights.py::",
    "tests/test_nonfinite.py::",
)
ATTENTION = "tests/test_attention.py::"
ALONE = f"{ATTENTION}test_logits_of_a_packed_row_are_those_of_its_documents_alone"
LAYERS = "tests/test_layers.py::"
TARGETS, REFERENCES = "tests/logprob/test_targets.py::", "tests/test_references.py::"
MODELS, RENDERING, CALLBACKS = "tests/test_models.py::", "tests/data/test_rendering.py::", "tests/callbacks/test_"
CUT_UP, FORMULA = f"{MODULE}test_how_a_step_is_cut_up_changes_nothing", f"{MODULE}test_the_first_step_is_the_formula"
DETACH = f"{NLL}test_the_weight_carries_no_gradient"
OWN_LOGITS = f"{MODELS}test_loss_and_every_gradient_equal_the_models_own_logits"
SHIFT = f"{BATCH}test_labels_are_shifted_once_and_masked"
GRADIENT = "tests/weighting/test_published.py::test_the_gradient_is_that_of_the_published_loss"
PACKED = "tests/weighting/test_published.py::test_packed_is_the_same_as_alone"
HAND = "tests/weighting/test_formulas.py::test_by_hand"
EDGES = "tests/weighting/test_formulas.py"
SHARDING, DEALT = "tests/sharding/test_", "tests/planning/test_dealt.py"
SPANS = f"{RENDERING}test_every_assistant_turn_and_its_stop_are_supervised"

FOUR_BITS = "tests/test_quantization.py::"
GPU = "tests/benchmarks/test_gpu_runner.py::"
PREEMPTION, EXPORTED = f"{CALLBACKS}preemption.py::", "tests/exporting/test_export_command.py::"
WRITTEN = "tests/checkpointing/test_run_checkpoints.py::"
MADE_UP, RENDEZVOUS = f"{PREEMPTION}test_a_validation_that_is_due_is_made_up_for", "tests/test_rendezvous.py"
LEFT = f"{PREEMPTION}test_the_step_is_finished_and_saved_and_the_rest_is_as_undisturbed"

SCALE = "trainer.accumulate_grad_batches / at_least_something(units_of(self._sums))"
BEFORE = 'before = np.flatnonzero(np.asarray(sequence["supervised"])[1:])'
MODIFIERS, MIXING = "weighting/modifiers.py", "weighting/mixing.py"
OF_MODIFIERS = "tests/weighting/test_modifiers.py::"
FORMULAS, INSIDE = f"{OF_MODIFIERS}TestFormulas", f"{OF_MODIFIERS}TestInsideOthers"
WEIGHTS, STOPS = "tests/data/test_weights.py::TestWeights", "tests/data/test_weights.py::TestStopTokens"
JOINED = """        rendered = Rendered([], [], [])
        whole = self._encode(["".join(part.text + part.stop for part in segments)], parsed=True)[0]
        prompt = len(self._encode([segments[0].text], parsed=True)[0])
        return Rendered(whole, [place >= prompt for place in range(len(whole))], [len(whole) - 1])
"""


class Fault(NamedTuple):
    trap: int
    what: str
    file: str
    edits: tuple[tuple[str, str], ...]
    tests: str


def fault(trap: int, what: str, file: str, old: str, new: str, tests: str, *more: tuple[str, str]) -> Fault:
    return Fault(trap, what, file, ((old, new), *more), tests)


FAULTS = [
    fault(16, "the norm of a rank's part", "sharding/tensors.py", "_added_up(squares, dealt[0])", "squares", f"{SHARDING}refusals.py::test_on_two_ranks[of_tensors]"),
    fault(16, "copies of a part count twice", "sharding/tensors.py", "else Replicate() for", 'else Partial("sum") for', f"{SHARDING}fsdp2.py::test_copies_of_shards[2]"),
    fault(0, "rotary frequencies are not sent", "sharding/loading.py", "    _send_buffers(network, read)", "    pass", f"{SHARDING}fsdp2.py::test_buffers_that_no_state_has_are_those_of_the_reader[2]"),
    fault(10, "what is brought along is rounded to bfloat16", "sharding/layers.py", "cast_forward_inputs=False", "cast_forward_inputs=True",
          f"{SHARDING}fsdp2.py::test_statistics_and_what_is_brought_along_stay_in_float32[2]"),
    fault(21, "a resumed optimizer has the state of a new one", "sharding/restoring.py", "like(parameter, value) if", "like(parameter, value * 0) if",
          f"{SHARDING}fsdp2.py::TestACheckpoint::test_on_as_many_ranks_a_run_goes_on_to_the_bit[all weights]"),
    fault(22, "the fingerprint of a rank's part", "reference.py", "full = whole(tensor.detach())", "full = part(tensor.detach())",
          f"{SHARDING}fsdp2.py::test_the_reference_has_one_fingerprint_on_any_number_of_ranks[2]", ("import whole\n", "import part\n")),
    fault(16, "gradients that wait are never summed", "sharding/strategy.py", "            reduce_each_time(network, True)", "            pass",
          f"{SHARDING}fsdp2.py::test_ranks_that_share_the_weights_have_the_gradient_of_one_process[2-reduced once a step]"),
    fault(0, "a frozen copy stays gathered", "scoring.py", "        let_go(*self._initial, around=True)", "        #",
          f"{SHARDING}fsdp2.py::test_a_frozen_copy_is_held_in_parts_between_micro_batches[2]"),
    fault(0, "how to generate is not sent", "sharding/loading.py", "    network.base.generation_config = _sent(", "    str(", f"{SHARDING}fsdp2.py::test_how_to_generate_is_what_the_reader_read[2]"),
    fault(22, "another precision's reference", "reference.py", "precision_of(trainer),", "str(trainer.precision),", f"{SHARDING}refusals.py::test_on_two_ranks[one_reads]"),
    fault(0, "the peak of what is held, not computed in", "callbacks/throughput.py", "computed_in(trainer) or ", "", f"{SHARDING}refusals.py::test_on_two_ranks[one_reads]"),
    fault(5, "an optimizer of whole weights gets parts", "refusals.py", "kinds & _OF_WHOLE_WEIGHTS", "kinds & set()", f"{SHARDING}refusals.py::test_on_two_ranks[refused]"),
    fault(0, "gathered as it is held", "planning/dealt.py", "(self.compute or each.dtype).itemsize", "each.element_size()", f"{DEALT}::test_it_is_the_arithmetic_of_scaling"),
    fault(0, "a copy that no rank shares", "planning/memory.py", "load.part(copied.parameters())", "nbytes(copied.parameters())", f"{DEALT}::TestMemory"),
    fault(0, "nothing waits for the step's end", "planning/memory.py", "load.accumulates and load.dealing.once_a_step", "False", f"{DEALT}::test_gradients_that_are_summed_once_a_step_wait_whole"),
    fault(1, "mean of micro-batch means", "normalizer.py", "        return None", '        normalize = "micro_batch"', CUT_UP,
          ('{"tokens": sum(batch.counts),', '{"tokens": min(sum(batch.counts), 1),')),
    fault(2, "divided again", "step.py", SCALE, f"{SCALE}.square()", FORMULA),
    fault(2, "not divided at all", "step.py", SCALE, "trainer.accumulate_grad_batches * self._sums.new_ones(())", FORMULA),
    fault(2, "Lightning's division stays", "step.py", SCALE, "1 / at_least_something(units_of(self._sums))", CUT_UP),
    fault(3, "a shorter last window", "data/steps.py", "return mine + [[]] * (self.micro_batches - len(mine))", "return mine",
          f"{STEPS}test_packed_steps_have_as_many_micro_batches_as_the_fullest_of_the_run"),
    fault(3, "Lightning's division by the full window", "step.py", SCALE, "sum(len(row) > 0 for row in self.skipped._rows) / at_least_something(units_of(self._sums))",
          CUT_UP),
    fault(4, "the weight is not detached", "logprob/rows.py", "grad.scatter_(1, target[own, None], at_target[own, None])",
          "grad.mul_((1 + logp[own])[:, None]).scatter_(1, target[own, None], ((1 + logp) * at_target)[own, None])", DETACH),
    fault(5, "the loss ignores the weighting", "logprob/rows.py", "weights = checked_weights(self.job.weighting, stats) if weigh is None else weigh(stats, rows)",
          "weights = torch.ones_like(stats.logp)", DETACH),
    fault(5, "the model ignores the weighting", "models.py", "            weighting,\n            sequence", 
          "            Uniform(),\n            sequence", FORMULA),
    fault(5, "the normaliser's factor is ignored", "logprob/rows.py", "weight if self.factor is None else weight * self.factor[rows]",
          "weight", FORMULA),
    fault(5, "a sequence is weighed in pieces", "logprob/chunked.py", "    return ends\n",
          "    return [*range(job.chunk_rows, len(job.target), job.chunk_rows), len(job.target)]\n", f"{NLL}TestSequencesInOnePass"),
    fault(6, "no shift", "data/batch.py", "tokens[before + 1]", "tokens[before]", SHIFT),
    fault(6, "shifted twice", "data/batch.py", "target.append(tokens[before + 1])",
          "target.append(tokens[np.minimum(before + 2, len(tokens) - 1)])", SHIFT),
    fault(7, "no mask", "data/batch.py", BEFORE, 'before = np.arange(len(sequence["supervised"]) - 1)', SHIFT),
    fault(8, "an empty batch has no graph", "logprob/chunked.py", "    return loss, job.result\n",
          "    return (loss if len(targets) else loss.detach()), job.result\n",
          f"{MODELS}test_an_empty_batch_reaches_every_parameter_with_zeros"),
    fault(8, "an empty batch is not a number", "logprob/chunked.py", "    return loss, job.result\n",
          "    return loss * (len(targets) / torch.tensor(float(len(targets)))), job.result\n",
          f"{NLL}test_no_rows_give_a_differentiable_zero"),
    fault(9, "unshifted labels are counted", "normalizer.py", '{"tokens": sum(batch.counts),',
          '{"tokens": sum(batch.counts) + with_tokens,', FORMULA),
    fault(10, "softmax in bfloat16", "logprob/chunked.py", "torch.float64 if hidden.dtype == torch.float64 else torch.float32",
          "hidden.dtype", f"{NLL}test_bfloat16_inputs_lose_no_more_than_the_naive_computation"),
    fault(10, "logits rounded to bfloat16", "logprob/rows.py", "        top = z.amax(1)\n",
          "        z.copy_(z.to(job.precision.product))\n        target_logit, top = z.gather(1, job.target[rows, None])[:, 0], z.amax(1)\n",
          f"{NLL}test_bfloat16_inputs_lose_no_more_than_the_naive_computation"),
    fault(10, "statistics in the run's precision", "metrics.py", "tokens.p.sum(dtype=torch.float64)", "tokens.p.bfloat16().sum()",
          "tests/test_metrics.py::test_sums_are_those_of_float64"),
    fault(12, "an adapted head is read without its adapter", "models.py", "if type(head) is not nn.Linear:", "if head is None:",
          f"{MODELS}TestLoRA::test_an_adapted_head_is_refused"),
    fault(13, "no soft-cap", "models.py", '"final_logit_softcapping"', '"nothing"', OWN_LOGITS),
    fault(13, "no soft-cap in the gradient", "logprob/head.py", "grad *= 1.0 - (logits / self.softcap).square()", "pass", OWN_LOGITS),
    fault(13, "no logit scale", "models.py", '"logit_scale"', '"nothing"', OWN_LOGITS),
    fault(13, "no logits scaling", "models.py", '"logits_scaling"', '"nothing"', OWN_LOGITS),
    fault(13, "no head bias", "models.py", "return LogitTransform(head.bias,", "return LogitTransform(None,", OWN_LOGITS),
    fault(14, "validation averages batches", "metrics.py", "self.sums = self.sums + sums",
          "self.sums = self.sums + sums / sums[3].clamp(min=1)", f"{MODULE}TestValidation"),
    fault(14, "the last validation batch is lost", "data/loaders.py", "whole = Geometry(max(len(rows), 1),",
          "whole = Geometry(shape.micro_batch_size,", "tests/data/test_datamodule.py::test_scoring_has_every_row_once_on_any_ranks",
          ("StepSampler(rows.lengths, whole)", "StepSampler(rows.lengths, whole, drop_last=True)")),
    fault(15, "the weighted loss is the monitor", "weighting/likelihood.py", '= ("val/p_mean", "max")', '= ("val/objective", "min")',
          f"{CALLBACKS}checkpoints.py::test_the_best_is_by_what_the_weighting_descends"),
    fault(16, "a statistic of the micro-batch", "scoring.py", "        return weigh_together(self.weighting, parts, self.trainer.world_size)",
          "        return [weigh_together(self.weighting, [part])[0] for part in parts]", f"{STEP_WEIGHTS}test_it_is_asked_once_a_step_about_all_of_its_tokens"),
    fault(16, "a statistic of the rank", "step_weights.py", "(mine, 0) if ranks == 1 else _gathered(mine)", "(mine, 0)",
          "tests/test_exactness.py::test_one_gradient_however_a_step_is_cut_up"),
    fault(16, "validation is weighed batch by batch", "scoring.py", "        weights = self._weigh_together([tokens for tokens, _ in held]) if held else []",
          "        weights = [self._weigh_together([tokens])[0] for tokens, _ in held]", f"{STEP_WEIGHTS}test_the_validation_set_is_looked_at_as_one_step"),
    fault(16, "the pass before has other dropout", "module.py", "            self._seed(number)\n            parts", "            parts",
          f"{STEP_WEIGHTS}test_the_weights_are_those_of_the_gradient_pass_with_its_dropout"),
    fault(17, "clipped before it is normalised", "step.py", "        scale_gradients(parts_of_gradients(parameters), factor)",
          '        parameters = list(parameters)\n'
          '        torch.nn.utils.clip_grad_norm_(parameters, trainer.gradient_clip_val or float("inf"))\n'
          "        scale_gradients(parts_of_gradients(parameters), factor)", CUT_UP),
    fault(17, "a skipped step moves the schedule", "module.py", "        if not self.step.skipped.this_one:\n            scheduler", "        if True:\n            scheduler",
          f"{NONFINITE}test_the_step_leaves_weights_optimizer_and_schedule_as_they_were"),
    fault(17, "a step that is not finite is made", "step.py", "                parameter.grad = None", "                pass",
          f"{NONFINITE}test_the_step_leaves_weights_optimizer_and_schedule_as_they_were"),
    fault(17, "skipped steps are not counted", "nonfinite.py", "            self.total += 1\n", "",
          f"{NONFINITE}test_the_step_leaves_weights_optimizer_and_schedule_as_they_were"),
    fault(18, "a mask of ones", "attention.py", 'return {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}',
          'return {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False, "attention_mask": torch.ones_like(batch.input_ids)}', ALONE),
    fault(18, "a cache", "attention.py", '"position_ids": batch.position_ids, "use_cache": False}', '"position_ids": batch.position_ids, "use_cache": True}', ALONE),
    fault(18, "no positions", "attention.py", '{"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache"', '{"input_ids": batch.input_ids, "use_cache"', ALONE),
    fault(18, "attention is not proved", "module.py", "                self._network.check_borders()", "                pass",
          f"{ATTENTION}test_a_packed_run_proves_it_first"),
    fault(18, "varlen sees the document before", "varlen.py", "in pairwise(borders.tolist())", "in pairwise(borders.tolist()[::2] + borders.tolist()[-1:] * (len(borders) % 2 == 0))", ALONE),
    fault(19, "labels cross borders", "data/batch.py", BEFORE, 'before = np.flatnonzero(np.asarray(sequence["supervised"])) - 1', f"{BATCH}test_packed_rows_in_ids_written_out"),
    fault(19, "positions go on", "data/batch.py", "np.repeat(ends - documents, documents)", "0", f"{BATCH}test_packed_rows_in_ids_written_out"),
    fault(19, "padding belongs to the last document", "data/batch.py", "for size in (*row, width - sum(row)) if size]",
          "for size in ((*row[:-1], width - sum(row[:-1])) if row else (width,))]", f"{BATCH}test_packed_rows_in_ids_written_out"),
    fault(20, "masked by the length of the prompt", "data/rendering.py", "        rendered = Rendered([], [], [])\n", JOINED,
          f"{RENDERING}test_merges_across_the_seam_stay_out"),
    fault(20, "the stop token is not learnt", "data/rendering.py", "rendered.supervised.extend([bool(segment.stop)] * len(tokens))",
          "rendered.supervised.extend([bool(segment.stop) and n < len(tokens) - 1 for n in range(len(tokens))])", SPANS),
    fault(20, "padding masks the stop token", "data/batch.py", BEFORE,
          'before = np.flatnonzero(np.asarray(sequence["supervised"])[1:] & (tokens[1:] != self.pad_id))',
          f"{BATCH}test_padding_with_the_stop_token_does_not_mask_the_real_one"),
    fault(21, "a resumed epoch begins anew", "data/loaders.py", 'self._resume["steps"] * sampler.micro_batches',
          '0', f"{CALLBACKS}checkpoints.py::test_a_run_in_two_parts_is_the_whole_run_to_the_bit"),
    fault(21, "an epoch's end is taken for its beginning", "data/loaders.py", '"epoch": epoch + done // sampler.steps', '"epoch": epoch',
          f"{CALLBACKS}checkpoints.py::test_a_run_in_two_parts_is_the_whole_run_to_the_bit"),
    fault(21, "dropout goes on by chance", "module.py", "        self._seed(number)\n        loss", "        loss",
          f"{CALLBACKS}checkpoints.py::test_dropout_goes_on_where_it_was"),
    fault(21, "saved before the validation", "callbacks/checkpoints.py", "if self._now and (self._owes_validation or not _validates_now(trainer)):", "if self._now:",
          f"{CALLBACKS}checkpoints.py::test_a_run_that_dies_in_a_validation_does_it_again"),
    fault(21, "written in place", "checkpointing/io.py", "    torch.save(checkpoint, place.begin(final))\n    _put(final)", "    torch.save(checkpoint, final)",
          f"{CALLBACKS}checkpoints.py::test_a_saving_that_fails_leaves_the_one_before"),
    fault(21, "logs stay in memory", "callbacks/checkpoints.py", "            logger.save()", "                pass",
          f"{CALLBACKS}checkpoints.py::test_what_was_logged_is_on_disk_with_the_checkpoint"),
    fault(21, "the checkpoint's learning rate wins", "module.py", "changed = restore_settings(self.trainer.optimizers[0], cast(Any, scheduler), self._settings)", "changed = []",
          "tests/test_resume.py::TestSettings::test_a_new_learning_rate_is_in_force_and_said", ("        scheduler = self.trainer.lr_scheduler_configs[0].scheduler\n", "")),
    fault(21, "micro-batches of another geometry", "module.py", "        resume.rescale_progress(checkpoint, self.trainer.accumulate_grad_batches)\n", "",
          "tests/test_resume.py::test_it_goes_on_in_another_geometry_with_the_same_gradients"),
    fault(21, "looking draws random numbers", "data/loaders.py", "generator=torch.Generator(),", "generator=None,",
          "tests/data/test_datamodule.py::test_looking_at_the_data_draws_no_random_numbers"),
    fault(17, "a loss that is not finite is let pass", "step.py", "math.isfinite(loss) and math.isfinite(norm)", "math.isfinite(norm)",
          f"{NONFINITE}test_a_loss_that_is_not_finite_is_enough"),
    fault(17, "no clipping by value", "step.py", "        torch._foreach_clamp_min_(gradients, -limit)\n        torch._foreach_clamp_max_(gradients, limit)", "        pass", f"{MODULE}test_clipping_by_value"),
    fault(10, "the norm in the run's precision", "sharding/tensors.py", "dtype=wide", "dtype=None", f"{MODULE}test_the_norm_is_that_of_float64_whatever_the_precision"),
    fault(22, "the reference in training mode", "models.py", "        self.eval()\n", "        self.train()\n",
          f"{MODELS}TestLoRA::test_the_adapter_off_is_the_reference_to_the_bit"),
    fault(23, "another formula by the same name", "weighting/likelihood.py", "tokens.p.clamp(min=self.floor)", "tokens.p + self.floor",
          "tests/weighting/test_weightings.py::test_golden_values"),
    fault(24, "inputs changed in place", "logprob/products.py", "wide = rounded.to(precision.compute)",
          "wide = rounded.to(precision.compute).mul_(1.001)", f"{NLL}test_inputs_are_left_as_they_were"),
    fault(25, "inf times 0", "logprob/head.py", "torch.where(logp > -torch.inf, logp.exp() * logp, 0.0)", "(logp.exp() * logp)",
          f"{NLL}test_forbidden_tokens_count_nothing"),
    fault(25, "a weight of p by dividing", "weighting/likelihood.py", "tokens.p.clamp(min=self.floor)", "(tokens.p * tokens.logp / tokens.logp).clamp(min=self.floor)",
          "tests/weighting/test_proof.py"),
    fault(0, "the first chunk's share of the head's gradient is lost", "logprob/passes.py", "add=gradients.begun", "add=False",
          f"{NLL}test_equals_the_oracle_in_float64"),
    fault(0, "rows that count take the place of others", "logprob/passes.py", "gradients.hidden[rows].index_copy_(0, counting, made)",
          "gradients.hidden[rows][: len(made)] = made", f"{NLL}test_tokens_of_weight_zero_cost_no_product_and_change_nothing"),
    fault(0, "bfloat16 logits, and a softmax in bfloat16", "logprob/rows.py", "self.logits.new_empty((held, *shape), dtype=compute)",
          "self.logits.new_empty((held, *shape))", f"{NLL}TestAtARealShape"),
    fault(0, "the GPU is waited for", "logprob/chunked.py", 'if sequence.device.type != "cpu":', "if False:", f"{NLL}test_no_device_is_waited_for"),
    fault(0, "the kernel is not given the normaliser's factor", "logprob/rows.py", "factor = None if job.factor is None else job.factor[chunk]",
          "factor = None", "tests/logprob/test_kernel.py::test_the_cases_in_the_interpreter"),
    fault(0, "selective recomputation keeps nothing", "recomputation.py", "return any(word in name for word in _KEPT)", "return False",
          f"{LAYERS}TestRecomputation::test_what_is_computed_again"),
    fault(0, "other dropout in the recomputation", "recomputation.py", "use_reentrant=False,", "use_reentrant=False, preserve_rng_state=False,",
          f"{LAYERS}TestRecomputation::test_gradients_are_the_same_to_the_bit"),
    fault(0, "compiled layers meet another shape", "data/loaders.py", "is_fixed = self.fixed_shape and", "is_fixed = False and",
          f"{LAYERS}TestCompilation::test_the_same_gradients_and_one_graph_for_the_run"),
    fault(0, "a target's mass is not given back", "logprob/targets.py", "torch.addcmul(q.neg(), p, q.sum(1, keepdim=True))", "q.neg()",
          f"{TARGETS}test_equals_the_oracle"),
    fault(0, "targets without the normaliser's factor", "logprob/targets.py", "q = q * job.factor[rows, None]", "pass", f"{TARGETS}test_equals_the_oracle"),
    fault(0, "targets of the rows before", "logprob/targets.py", "return slice(chunk.start + part.start, chunk.start + part.stop)", "return part",
          f"{TARGETS}test_equals_the_oracle"),
    fault(0, "the reference without its transform", "logprob/targets.py", "_log_softmax(job.reference.transform.forward_(wide))", "_log_softmax(wide)",
          f"{TARGETS}test_equals_the_oracle"),
    fault(0, "rows of weight zero lose their targets", "logprob/passes.py", " or job.weighting.vocabulary:", ":", f"{TARGETS}test_a_weight_of_zero_leaves_the_targets"),
    fault(0, "ASFT's divergences are the same", "weighting/vocabulary.py", 'if self.direction == "forward":', "if True:", f"{TARGETS}test_the_gradient_is_that_of_the_published_loss"),
    fault(0, "GEM's q is the model's own", "weighting/vocabulary.py", "(logp / self.beta)", "(logp / 1.0)", f"{TARGETS}test_the_gradient_is_that_of_the_published_loss"),
    fault(0, "GEM's h is forgotten", "weighting/vocabulary.py", 'self.h == "logsigmoid":', "False:", f"{TARGETS}test_the_gradient_is_that_of_the_published_loss"),
    fault(0, "GIFT tilts every word", "weighting/vocabulary.py", "scatter_add(1, tokens.target[:, None], tilt)", "add(tilt)", f"{TARGETS}test_the_gradient_is_that_of_the_published_loss"),
    fault(0, "smoothing by ε in place of ε/V", "weighting/vocabulary.py", "self.smoothing / logp.shape[1]", "self.smoothing", f"{TARGETS}test_the_gradient_is_that_of_the_published_loss"),
    fault(0, "an entropy penalty", "weighting/vocabulary.py", "self.strength * (surprise", "-self.strength * (surprise", f"{TARGETS}test_the_gradient_is_that_of_the_published_loss"),
    fault(0, "the reference is the model with its adapter", "models.py", "with self._evaluating(adapter=False):", "with self._evaluating(adapter=True):",
          f"{REFERENCES}TestTheReferencesDistribution"),
    fault(0, "the copy is trained too", "reference.py", "network = initial_network(module, frozen=True)\n    module", "network = module.network\n    module",
          f"{REFERENCES}TestTheReferencesDistribution"),
    fault(0, "a new old policy every step", "old_policy.py", "return not self.start <= step < self.end", "return True", f"{REFERENCES}TestTheOldPolicy"),
    fault(0, "an old policy for ever", "old_policy.py", "return not self.start <= step < self.end", "return not self.end", f"{REFERENCES}TestTheOldPolicy"),
    fault(0, "the old policy is lost in a checkpoint", "module.py", 'if self.old_policy is not None and "old_policy" in facts and facts["identity"]["data"] == now["data"]:', "if False:",
          f"{REFERENCES}TestTheOldPolicy"),
    fault(0, "mean weight 1 is forgotten", "normalizer.py", 'if divisor != "tokens":', "if False:", f"{REFERENCES}TestTheDivisor"),
    fault(0, "the divisor without the normaliser's factor", "normalizer.py", "(counted * factor).sum()", "counted.sum()", f"{REFERENCES}TestTheDivisor"),
    fault(0, "a bound above only", MODIFIERS, ".clamp(self.low, self.high)", ".clamp(max=self.high)", FORMULAS),
    fault(0, "a bound below only", MODIFIERS, ".clamp(self.low, self.high)", ".clamp(min=self.low)", FORMULAS),
    fault(0, "the temperature multiplies", MODIFIERS, "self.power / self.temperature)", "self.power * self.temperature)", FORMULAS),
    fault(0, "negative weights are squared", MODIFIERS, "negative.any()", "False", FORMULAS, (".masked_fill(negative, math.nan)", "")),
    fault(0, "exempt tokens keep what they had", MODIFIERS, ".masked_fill(self.exempted(tokens), self.weight)", "", FORMULAS),
    fault(0, "exempt tokens have weight 1, always", MODIFIERS, "self.exempted(tokens), self.weight)", "self.exempted(tokens), 1.0)", FORMULAS),
    fault(0, "only the last id is exempt", MODIFIERS, "found = found | (tokens.target == each)", "found = tokens.target == each", FORMULAS),
    fault(0, "the weights of the data are ignored", MODIFIERS, 'unit_weights(self.of, tokens) * tokens.need("data_weight")', "unit_weights(self.of, tokens)", FORMULAS),
    fault(0, "a mean of 1 that is none", MODIFIERS, 'return "weights"', 'return "tokens"', FORMULAS),
    fault(0, "shares the wrong way round", MIXING, "zip((1.0 - share, share)", "zip((share, 1.0 - share)", FORMULAS),
    fault(0, "a share that stays", MIXING, "(final - self.share) * min(progress / self.until, 1.0)", "0.0", FORMULAS),
    fault(0, "a share that goes on", MIXING, "min(progress / self.until, 1.0)", "progress / self.until", FORMULAS),
    fault(0, "a warm-up that does not end", MIXING, "over = progress >= self.share", "over = progress >= 1.0", FORMULAS),
    fault(0, "a ramp that jumps", MIXING, "progress / self.share if self.ramp else 0.0", "0.0", FORMULAS),
    fault(0, "a part's divisor is lost", "weighting/composition.py", 'if part.divisor == "tokens":', "if True:", INSIDE),
    fault(0, "a part's divisor is that of a chunk", "weighting/composition.py", '"step" if part.divisor != "tokens" else part.scope', "part.scope", INSIDE),
    fault(0, "the mean over those selected is over their weight", "weighting/composition.py", 'else (weights != 0))', "else weights.square() * 2)", INSIDE),
    fault(0, "targets are not mixed", MIXING, "parts = (factor * checked_targets(", "parts = (checked_targets(", f"{OF_MODIFIERS}TestTargetsOverTheVocabulary"),
    fault(0, "exempt tokens keep their targets", MODIFIERS, "targets.masked_fill(self.exempted(tokens)[:, None], 0.0)", "targets", f"{OF_MODIFIERS}TestTargetsOverTheVocabulary"),
    fault(0, "schedules are proved halfway only", "weighting/proof.py", "_HALFWAY, _ELSEWHERE = 0.5, (0.0, 0.1, 0.25, 0.75, 1.0)", "_HALFWAY, _ELSEWHERE = 0.5, (0.5,)",
          f"{OF_MODIFIERS}TestWhatFollowsFromTheParts"),
    fault(0, "weights are not shifted with their tokens", "data/batch.py", 'np.asarray(s[name], dtype)[at]', 'np.asarray(s[name], dtype)[at - 1]', WEIGHTS),
    fault(0, "a missing weight is 1", "data/weights.py", 'raise UnusableRow("the weight is missing or null", column)', "return 1.0", WEIGHTS),
    fault(0, "a message's weight is that of the turn before", "data/weights.py", "np.searchsorted(rendered.ends, places)", "np.maximum(np.searchsorted(rendered.ends, places) - 1, 0)", WEIGHTS),
    fault(0, "a row's weight wins over a message's", "data/weights.py", "weights *= np.array(of_row)", "weights = np.ones(len(places)) * np.array(of_row)", WEIGHTS),
    fault(0, "stop tokens by runs", "data/rendering.py", "[len(rendered.input_ids) - 1] if segment.stop else []", "[len(rendered.input_ids) - 1] if segment.stop and segment is segments[-1] else []", STOPS),
    fault(0, "weights of the data are passed over", "data_weights.py", 'if "data_weight" not in weighting.needs and report.unequal:', "if False:", "tests/test_data_weights.py::TestRefusals"),
    fault(0, "a checkpoint that is late is not written", "step.py", "if wish)", "if False)", f"{CALLBACKS}checkpoints.py"),
    fault(0, "calibration of the target in place of the likeliest", "callbacks/looks/tally.py", "confidence = tokens.top_p.double()", "confidence = p",
          f"{CALLBACKS}tally.py::TestCalibration"),
    fault(0, "the share of the weight is that of the tokens", "callbacks/looks/tally.py", "len(P_LABELS), weight.abs())[:, 0]", "len(P_LABELS), one)[:, 0]",
          f"{CALLBACKS}tally.py::test_by_p_weight_and_class"),
    fault(0, "the likeliest token's probability is the target's", "logprob/head.py", "(logits.amax(1) - lse).exp()", "(_target_logit - lse).exp()",
          f"{CALLBACKS}looks.py::test_numbers_are_those_of_full_logits"),
    fault(0, "KL the other way round", "callbacks/looks/initial.py", "before.exp() * (before - now)", "now.exp() * (now - before)",
          f"{CALLBACKS}initial.py"),
    fault(0, "a resumed run forgets the initial model", "callbacks/token_probabilities.py", "watching(network, self.start is None)", "watching(network, self._reported == trainer.global_step)",
          f"{CALLBACKS}initial.py::test_a_resumed_run_compares_with_the_initial_model"),
    fault(0, "ranks put their tokens on top of each other", "callbacks/looks/probe.py", "whole[self.places(batch)] = of_batch", "whole[: len(of_batch)] += of_batch",
          f"{CALLBACKS}looks.py::test_every_rank_puts_its_tokens_at_their_places"),
    fault(0, "pushed up and pushed down change places", "callbacks/looks/change.py", "change = (now - before)", "change = (before - now)",
          f"{CALLBACKS}change.py::test_mean_count_and_interval_by_hand"),
    fault(0, "looking leaves evaluation mode on", "callbacks/token_probabilities.py", "        module.train(training)\n", "",
          f"{CALLBACKS}token_probabilities.py::TestRun::test_training_does_not_notice"),
    fault(0, "formula of MixCE: the shares change places", "weighting/likelihood.py", "self.eta + (1.0 - self.eta) * tokens.p", "(1.0 - self.eta) + self.eta * tokens.p",
          GRADIENT),
    fault(0, "formula of the power family: the gradient of p^alpha itself", "weighting/likelihood.py", "(self.alpha * tokens.logp).exp()", "self.alpha * (self.alpha * tokens.logp).exp()",
          GRADIENT),
    fault(0, "formula of thresholds: the other side", "weighting/selection.py", 'p >= self.threshold if self.keep == "top" else', 'p < self.threshold if self.keep == "top" else',
          GRADIENT),
    fault(0, "formula of thresholds: log p gets the weight of p", "weighting/selection.py", 'return kept * (counted if self.on == "p" else torch.ones_like(p))', "return kept * counted",
          GRADIENT),
    fault(0, "formula of thresholds: what is left out stays in the denominator", "weighting/selection.py", 'divisor: ClassVar[Divisor] = "selected"', 'divisor: ClassVar[Divisor] = "tokens"',
          GRADIENT),
    fault(0, "formula of ProFit: the middle has no upper end", "weighting/selection.py", "kept = kept & (p <= self.upper)", "pass",
          GRADIENT),
    fault(0, "formula of ProFit: the lower tokens are the higher ones", "weighting/selection.py", 'p <= self.threshold if self.keep == "lower" else', 'p >= self.threshold if self.keep == "lower" else',
          GRADIENT),
    fault(0, "formula of CHORD: p in place of p(1 − p)", "weighting/likelihood.py", "return tokens.p * missing(tokens)", "return tokens.p",
          GRADIENT),
    fault(0, "formula of LUFFY: not squared", "weighting/likelihood.py", "(p + self.gamma).square()", "(p + self.gamma)",
          GRADIENT),
    fault(0, "formula of focal: detached all the same", "weighting/likelihood.py", "factor * (1.0 - self.gamma * tokens.p * ratio)", "factor",
          GRADIENT),
    fault(0, "formula of focal: 0 · ∞ at p = 1", "weighting/likelihood.py", "torch.where(rest > 0, tokens.logp / rest, -1.0)", "tokens.logp / rest",
          EDGES),
    fault(0, "formula of TALR: the mean in place of the median", "weighting/adaptive.py", "mean.quantile(0.5)", "mean.mean()",
          GRADIENT),
    fault(0, "formula of TALR: the median of tokens, not of responses", "weighting/adaptive.py", "mean, _ = sequence_means(tokens, -tokens.logp)\n        tau = mean.", "tau = (-tokens.logp).",
          GRADIENT),
    fault(0, "formula of TALR: p^τ", "weighting/adaptive.py", "(tokens.logp / tau).exp()", "(tokens.logp * tau).exp()",
          GRADIENT),
    fault(0, "formula of TALR: a step in which all is certain", "weighting/adaptive.py", ".quantile(0.5).clamp(min=1e-6)", ".quantile(0.5)",
          EDGES),
    fault(0, "formula of InfoSFT: weights below 0", "weighting/adaptive.py", "(highest - logit).clamp(min=0)", "(highest - logit)",
          GRADIENT),
    fault(0, "formula of InfoSFT: not divided by its mean", "weighting/adaptive.py", 'divisor: ClassVar[Divisor] = "weights"', 'divisor: ClassVar[Divisor] = "tokens"',
          GRADIENT),
    fault(0, "formula of Cayley: the whole mean", "weighting/adaptive.py", "0.5 * p.mean()", "p.mean()",
          GRADIENT),
    fault(0, "formula of Cayley: p/(1 − p)", "weighting/adaptive.py", "* p / (2.0 - p)", "* p / (1.0 - p)",
          GRADIENT),
    fault(0, "formula of EAFT: not divided", "weighting/distribution.py", "/ self.divide_by) ** self.alpha", ") ** self.alpha",
          GRADIENT),
    fault(0, "formula of EAFT: the entropy of all words", "weighting/distribution.py", 'tokens.need("topk_entropy").clamp(min=0)', 'tokens.need("entropy").clamp(min=0)',
          GRADIENT, ('needs = frozenset({"topk_entropy"})', 'needs = frozenset({"entropy"})')),
    fault(0, "formula of DEFT: p in place of p^a", "weighting/distribution.py", "(a * tokens.logp).exp() * (", "tokens.p * (",
          GRADIENT),
    fault(0, "formula of DEFT: without the division", "weighting/distribution.py", "* (a / (a + 1e-6))", "* a",
          GRADIENT),
    fault(0, "formula of SRFT: the token's own entropy", "weighting/distribution.py", 'tokens.sequence_mean(tokens.need("entropy"))', 'tokens.need("entropy")',
          GRADIENT),
    fault(0, "formula of PSFT: clipped, not dropped", "weighting/reference.py", "torch.where(ratio <= 1.0 + self.clip, ratio, 0.0)", "ratio.clamp(max=1.0 + self.clip)",
          GRADIENT),
    fault(0, "formula of PSFT: no ratio", "weighting/reference.py", "torch.where(ratio <= 1.0 + self.clip, ratio, 0.0)", "(ratio <= 1.0 + self.clip).to(ratio)",
          GRADIENT),
    fault(0, "formula of Rho-1: the easy tokens", "weighting/reference.py", 'tokens.need("ref_logp") - tokens.logp\n        kept', 'tokens.logp - tokens.need("ref_logp")\n        kept',
          GRADIENT),
    fault(0, "formula of Rho-1: one token more", "weighting/reference.py", "[kept - 1]", "[min(kept, len(excess) - 1)]",
          GRADIENT),
    fault(0, "formula of Rho-1: all tokens in the denominator", "weighting/reference.py", 'divisor: ClassVar[Divisor] = "selected"', 'divisor: ClassVar[Divisor] = "tokens"',
          GRADIENT),
    fault(0, "formula of Rho-1: rounding decides while all tie", "weighting/reference.py", "values[kept - 1] - _TIE", "values[kept - 1]",
          "tests/weighting/test_formulas.py::test_rounding_is_no_excess"),
    fault(0, "formula of iw-SFT: the sum over the response", "weighting/reference.py", "tokens.sequence_mean(ratio)", "tokens.sequence_sum(ratio)",
          GRADIENT),
    fault(0, "formula of CADFT: easy responses get more", "weighting/sentence.py", "z.clamp(min=0)", "z",
          GRADIENT),
    fault(0, "formula of CADFT: the deviation of a population", "weighting/sentence.py", "mean.std()", "mean.std(correction=0)",
          GRADIENT),
    fault(0, "formula of CADFT: a response alone", "weighting/sentence.py", "if len(mean) == 1:", "if False:",
          HAND),
    fault(0, "formula of the sentence: the mean is taken of p", "weighting/sentence.py", "return over(tokens.logp).exp()", "return over(tokens.p)",
          GRADIENT),
    fault(0, "formula of the sentence: the batch for a sentence", "weighting/sentence.py", 'if self.mean == "geometric" else tokens.sequence_sum', 'if self.mean == "geometric" else lambda x: x.sum().expand(len(x))',
          PACKED),
    fault(21, "asked to leave, it does not save", "callbacks/checkpoints.py", "or last or self._leaving", "or last", LEFT),
    fault(21, "asked to leave after the last step, it asks to be started again", "callbacks/checkpoints.py",
          "LEAVE in wished and step < module.total_steps", "LEAVE in wished", f"{PREEMPTION}test_after_the_last_step_the_run_just_ends"),
    fault(21, "a validation that is due is left out", "callbacks/checkpoints.py", "        if not self._owes_validation:\n", "        if True:\n", MADE_UP),
    fault(21, "asked to leave, it validates first", "callbacks/checkpoints.py", "= self._leaving and within and", "= False and within and", MADE_UP),
    fault(21, "a validation that was made up for is counted twice", "callbacks/checkpoints.py", "    steps._batches_that_stepped -= 1\n", "", MADE_UP),
    fault(21, "each micro-batch waits for a signal", "callbacks/preemption.py",
          "    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]\n", "",
          f"{SHARDING}waits.py::test_lightnings_way_would_be_seen"),
    fault(21, "an error hides that a run was asked to leave", "cli.py", "return 2 if NOTICE.received is None else AGAIN", "return 2",
          f"{PREEMPTION}test_an_error_after_a_signal_that_was_swallowed_asks_to_be_started_again"),
    fault(21, "a signal outlives the run that it was for", "signals.py", "self._pipe = self.received = None", "self._pipe = None", LEFT),
    fault(21, "an import swallows a signal", "signals.py", "        if self.is_importing:\n", "        if False:\n",
          "tests/test_signals.py::test_while_libraries_are_imported_it_needs_no_exception_to_come_through"),
    fault(21, "a restarted rank takes an invitation to another", "rendezvous.py", 'if invitation["words"][rank] != word:', "if False:", RENDEZVOUS),
    fault(21, "restarted ranks are not invited again", "rendezvous.py", "if here != invited:", "if not invited:", RENDEZVOUS),
    fault(21, "restarted ranks share what earlier ones wrote", "cli.py", "    meet_anew()\n", "", RENDEZVOUS),
    fault(0, "an export is for its owner alone", "exporting/folder.py", '    _all_may_read_what_the_umask_allows(unfinished, like=unfinished / "README.md")\n', "",
          f"{EXPORTED}TestFolder::test_may_be_read_by_whom_the_umask_allows"),
    fault(21, "Lightning handles signals, too", "callbacks/preemption.py", "        _without_lightnings(trainer)\n", "",
          f"{PREEMPTION}test_lightnings_own_handling_is_off_and_the_handlers_come_back"),
    fault(21, "data workers die of a signal to the job", "data/loaders.py", "only_from_the_parent if workers else None", "None",
          f"{PREEMPTION}test_data_workers_outlive_a_signal_to_the_whole_job"),
    fault(21, "a second signal waits for the first", "signals.py", "                os._exit(AGAIN)", "                pass",
          "tests/test_signals.py::test_a_second_one_ends_the_process_at_once_even_where_python_runs_no_handler"),
    fault(21, "a signal that is handed on twice ends the run", "signals.py", "> APART", "> 0",
          "tests/test_signals.py::test_a_second_one_ends_the_process_at_once_even_where_python_runs_no_handler"),
    fault(21, "a worker's signal counts as its parent's", "signals.py", "        os.register_at_fork(after_in_child=self._forget)\n", "",
          "tests/test_signals.py::test_a_forked_process_dies_of_a_signal_and_does_not_tell_its_parent"),
    fault(12, "an export is not merged", "exporting/stored.py", "return self.model(model_name).merge_and_unload()", "return self.model(model_name)",
          f"{EXPORTED}TestLogits::test_of_a_merged_adapter"),
    fault(20, "an export has the model's chat template, not the run's", "exporting/stored.py", 'load_tokenizer(source, options["chat_template"])',
          "load_tokenizer(source)", f"{EXPORTED}TestLogits::test_with_the_chat_template_of_the_run"),
    fault(21, "an export reads the optimizer", "checkpointing/reading.py", "mmap=True)", "mmap=False)", f"{EXPORTED}TestFolder::test_does_not_read_the_optimizer"),
    fault(21, "the checkpoint before goes first", "checkpointing/place.py", "        os.replace(path, before(path))", "        remove(path)", f"{WRITTEN}TestKilledWhileItWasPutInPlace"),
    fault(21, "what is written meanwhile is trained on", "checkpointing/io.py", "_write_file, copied(checkpoint), final", "_write_file, checkpoint, final",
          f"{WRITTEN}TestWriting::test_what_is_written_meanwhile_is_the_state_it_had"),
    fault(21, "an error meanwhile is let pass", "checkpointing/io.py", "            future.result()\n", "            pass\n", f"{WRITTEN}TestWriting::test_an_error_meanwhile_is_raised_where_the_next_begins"),
    fault(21, "a part that is cut off passes for whole", "checkpointing/folder.py", "if there < size:", "if there < 0:", f"{WRITTEN}TestReading::test_a_damaged_folder_is_not_read"),
    fault(21, "the one before goes before the new one is found whole", "checkpointing/io.py", "    skeleton(place.unfinished(final))\n", "",
          f"{WRITTEN}TestWriting::test_the_one_before_stays_until_the_folder_is_found_whole"),
    fault(0, "an index runs code", "checkpointing/folder.py", "_Unpickler(file)", "pickle.Unpickler(file)", f"{WRITTEN}TestReading::test_an_index_that_would_run_code_is_refused"),
    fault(21, "a folder's optimizer is a new one", "sharding/restoring.py", "        folder.fill(path, folder.tensors_of({", "        (lambda *_: None)(path, folder.tensors_of({", f"{SHARDING}folders.py::test_on_as_many_ranks_a_run_goes_on_to_the_bit"),
    fault(21, "a folder's weights stay those of the start", "sharding/restoring.py", "    folder.fill(path, {name: own", "    (lambda *_: None)(path, {name: own", f"{SHARDING}folders.py::test_on_as_many_ranks_a_run_goes_on_to_the_bit"),
    fault(21, "two runs in one folder", "checkpointing/lock.py", "            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)", "            pass", "tests/checkpointing/test_lock.py::test_a_second_run_is_refused_by_name"),
    fault(21, "what a launcher starts again begins anew", "restarts.py", 'earlier[-1].get("job") == job()', "False", "tests/test_restarts.py::test_overwrite_counts_for_the_first_start_alone"),
    fault(21, "another job's run is gone on with", "restarts.py", 'earlier[-1].get("job") == job()', "True", "tests/test_restarts.py::test_only_the_job_that_began_it_goes_on"),
    fault(0, "an earlier answer to a roll call counts", "callbacks/roll_call.py", "self._store.delete_key(self._place)", "pass", f"{CALLBACKS}roll_call.py::test_an_earlier_answer_is_none"),
    fault(21, "ranks begin at different steps", "callbacks/checkpoints.py", "float(found != first)", "0.0", f"{SHARDING}refusals.py::test_on_two_ranks[refused]"),
    fault(12, "DoRA begins beside its model", "adapters.py", "    begin_at_the_model(adapted)\n", "",
          "tests/test_adapters.py::test_an_adapter_begins_as_its_model_to_the_bit"),
    fault(22, "DoRA begins where another device stood", "adapters.py", "    if initial:\n", "    if False:\n",
          "tests/test_adapters.py::test_another_device_adds_up_in_another_order"),
    fault(21, "DoRA begins anew after a restart", "adapters.py", "    if initial:\n", "    if True:\n",
          "tests/test_adapters.py::test_what_dora_has_learnt_outlives_a_restart"),
    fault(0, "rank-stabilised adapters are plain ones", "adapters.py", "use_rslora=lora.rslora", "use_rslora=False",
          "tests/test_adapters.py::test_the_formulas"),
    fault(0, "layers in 4 bits are evaluated in another precision", "quantization.py", "        layer.support_avx512bf16_for_cpu = False\n", "",
          f"{FOUR_BITS}TestTheBase::test_evaluated_once_it_still_computes_alike_and_lets_gradients_through"),  # on CPUs with AVX512-BF16
    fault(0, "a scale goes over the end of a row", "quantization.py", "if layer.in_features % BLOCK:", "if False:",
          f"{FOUR_BITS}TestRefusals::test_rows_over_the_end_of_which_a_scale_would_go"),
    fault(21, "a checkpoint holds a base in 4 bits", "models.py", "            leave_out_of_states(self)\n", "            pass\n",
          f"{FOUR_BITS}TestTraining::test_a_checkpoint_is_the_adapter_alone_and_goes_on_to_the_bit"),
    fault(21, "an adapter goes on beside another base", "resume.py", "= module.network.left_out", "= None",
          f"{FOUR_BITS}TestTraining::test_beside_another_base_it_does_not_go_on"),
    fault(21, "a state may leave out adapters, too", "quantization.py", "[name for name in found.missing_keys if is_learnt(name)]", "[]",
          f"{FOUR_BITS}test_a_state_without_an_adapter_is_not_taken"),
    fault(12, "an adapter is merged into weights that it was not trained beside", "exporting/stored.py", "self._filled(read_out(packed), source)",
          "self._filled(load_model(ModelSource(source.name, source.dtype)), source)", "tests/exporting/test_export_equality.py::test_beside_a_base_in_4_bits"),
    fault(22, "DoRA begins beside a base in 4 bits", "adapters.py", "weight_of(layer.get_base_layer()).to", "torch.ones_like(weight_of(layer.get_base_layer())).to",
          f"{FOUR_BITS}TestTraining::test_with_its_adapter_off_it_is_the_reference_to_the_bit[bf16-true-dora]"),
    fault(0, "weights read out of 4 bits are kept for the backward pass", "planning/four_bits.py", "ctx.shape, ctx.scales = shape, scales\n", "ctx.shape, ctx.scales, ctx.kept = shape, scales, _read_out(x, shape, scales)\n",
          "tests/planning/test_four_bits.py::test_the_peak_is_that_of_a_real_run"),
    fault(0, "what is around the layers is gathered twice", "planning/traffic.py", "mesh, precision, gathers=1)\n    between", "mesh, precision, gathers=2)\n    between",
          "tests/planning/test_scaling.py::test_torch_shards_and_moves_as_much[2-1]"),
    fault(0, "shares of weights are rounded down", "planning/scaling.py", "each = math.ceil(rows / shards)", "each = rows // shards",
          "tests/planning/test_scaling.py::test_rows_are_shared_as_torch_chunks_them"),
    fault(0, "a node gets what it has", "planning/traffic.py", "size * (nodes - 1) / nodes / (ranks / nodes)", "size * (ranks - 1) / ranks / (ranks / nodes)",
          "tests/planning/test_traffic.py::TestRing"),
    fault(0, "secrets are kept with a run", "environment.py", "if name.startswith(_VARIABLES)", "if name",
          "tests/callbacks/test_environment.py::TestWhatIsKept::test_no_secret_of_the_environment"),
    fault(0, "a start takes the place of the earlier ones", "environment.py", "[*starts(run_dir), found]", "[found]",
          "tests/callbacks/test_environment.py::TestWhatIsKept::test_each_start_is_added"),
    fault(0, "the mean of ranks passes for the worst", "callbacks/throughput.py", 'float(of.max())', 'float(of.mean())',
          "tests/callbacks/test_throughput.py::test_ranks_are_added_up"),
    fault(0, "torch's kernel told what 2.11 lacks", "varlen.py", 'if "enable_gqa" in _OPTIONS_OF_KERNEL:', "if True:", "tests/test_varlen_versions.py"),
    fault(0, "torch 2.10's scale is not honoured", "varlen.py", "        q = q * (scaling * q.shape[-1] ** 0.5)", "        pass", "tests/test_varlen_versions.py"),
    fault(0, "one key too many in torch's window", "varlen.py", "-1 if window is None else window - 1, 0", "-1 if window is None else window, 0", "tests/test_varlen_versions.py"),
    fault(0, "a GPU part's children outlive its limit", "../benchmarks/gpu/process.py", "            children |= descendants(process.pid)\n", "", f"{GPU}test_a_part_is_killed_at_its_limit_with_all_that_it_has_started", ("children | descendants(process.pid)", "children")),
    fault(0, "a GPU part without a time limit", "../benchmarks/gpu/runner.py", "min(_DRY_SECONDS if self.options.dry_run else part.seconds, left)", "left", f"{GPU}test_a_part_is_killed_at_its_limit_with_all_that_it_has_started"),
    fault(0, "a crash of a GPU part is no failure", "../benchmarks/gpu/runner.py", "if exit_code else", "if False else", f"{GPU}test_a_failure_does_not_stop_the_rest"),
    fault(0, "results of other hardware are taken over", "../benchmarks/gpu/runner.py", '("dry_run", "machine", "code")', '("dry_run", "code")', f"{GPU}test_other_hardware_or_code_begins_from_scratch"),
    fault(0, "a part that was killed counts as finished", "../benchmarks/gpu/runner.py", "finished = done and not verdict", "finished = True", f"{GPU}test_what_was_broken_off_is_run_again"),
    fault(37, "a bound is met by what is no number", "../benchmarks/gpu/part.py", "met = self.value <= self.bound if", "met = not self.value > self.bound if", f"{GPU}test_verdicts"),
]  # fmt: skip


def pytest(folder: Path, tests: list[str]) -> tuple[int, str]:
    """Exit status and output of these tests, on the package in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout


def verdict(planted: Fault, folder: Path) -> str:
    """red, GREEN or BROKEN, with the fault in place; the file is as before afterwards."""
    path = folder / "dft_lightning" / planted.file
    text = faulty = path.read_text()
    for old, new in planted.edits:
        if faulty.count(old) != 1:
            return f"BROKEN: {old!r} is {faulty.count(old)} times in {planted.file}"
        faulty = faulty.replace(old, new)
    path.write_text(faulty)
    status, output = pytest(folder, [planted.tests])
    path.write_text(text)
    return {0: "GREEN", 1: "red"}.get(status, f"BROKEN: pytest left with {status}: {output[-300:]}")


def main(words: list[str]) -> int:
    chosen = [planted for planted in FAULTS if all(word in str(planted) for word in words)]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for name in ("dft_lightning", "tests", "benchmarks"):
            shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPOSITORY / "pyproject.toml", folder)
        status, output = pytest(folder, sorted({planted.tests for planted in chosen}))
        if status:
            print(f"the tests fail without any fault:\n{output[-3000:]}")
            return 1
        stayed = 0
        for planted in chosen:
            result = verdict(planted, folder)
            stayed += result != "red"
            print(f"{planted.trap:>2} | {planted.what:<45} | {result}", flush=True)
    print(f"{len(chosen) - stayed} of {len(chosen)} faults turn a test red")
    return 1 if stayed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
