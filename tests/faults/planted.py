"""The planted faults: one realistic mistake each, and the test module that has to catch it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """A mistake in one place of the package.

    Attributes:
        name: What is wrong.
        file: The source file, below ``slm_plugin/``.
        original: A text that stands there exactly once.
        faulty: What takes its place.
        tests: The test module that fails then, below ``tests/``; with spaces between, several.
    """

    name: str
    file: str
    original: str
    faulty: str
    tests: str


FAULTS = (
    Fault(
        "the first token's state instead of the last one's",
        "pruners/depth/angular.py",
        "state[:, -1]",
        "state[:, 0]",
        "pruners/depth/test_angular.py",
    ),
    Fault(
        "a block's distance ends one layer early",
        "pruners/depth/angular.py",
        "states[:-layers], states[layers:]",
        "states[:-layers], states[layers - 1 : -1]",
        "pruners/depth/test_angular.py",
    ),
    Fault(
        "ties drop the highest layer",
        "pruners/depth/dropping.py",
        "(scores[index], index)",
        "(scores[index], -index)",
        "pruners/depth/test_dropping.py",
    ),
    Fault(
        "the deepest layer is not protected",
        "pruners/depth/deepest.py",
        "range(layers - 1)",
        "range(layers)",
        "pruners/depth/test_deepest.py",
    ),
    Fault(
        "the share refers to the current model instead of the original",
        "pruners/depth/depth_plan.py",
        "/ session.original.parameters",
        "/ before.parameters",
        "pruners/depth/test_dropping.py",
    ),
    Fault(
        "the last window of a size is one layer short",
        "pruners/depth/laco.py",
        "wanted - removed(runs) + 1)",
        "wanted - removed(runs))",
        "pruners/depth/test_laco.py",
    ),
    Fault(
        "RDSC of sums subtracts the lowest layer once too often",
        "pruners/depth/laco.py",
        "(2 - len(window)) * part",
        "(1 - len(window)) * part",
        "pruners/depth/test_laco.py",
    ),
    Fault(
        "> for >= where a window is moved back",
        "pruners/depth/laco.py",
        "if low >= left else low",
        "if low > left else low",
        "pruners/depth/test_laco.py",
    ),
    Fault(
        "the shares of two merged layers are exchanged",
        "pruners/depth/merge_concat.py",
        "low / (low + high) if",
        "high / (low + high) if",
        "pruners/depth/test_merge_concat.py",
    ),
    Fault(
        "equal shares give the remainder to the upper layer",
        "pruners/depth/merge_concat.py",
        "if share >= 0.5:",
        "if share > 0.5:",
        "pruners/depth/test_merge_concat.py",
    ),
    Fault(
        "a bias is not scaled by its share",
        "pruners/depth/merge_concat.py",
        "bias_share=part.bias_share * share",
        "bias_share=part.bias_share",
        "pruners/depth/test_merge_concat.py",
    ),
    Fault(
        "Shapley weights of coalitions with the player",
        "pruners/depth/shapley.py",
        "math.comb(count - 1, len(removed))",
        "math.comb(count, len(removed))",
        "pruners/depth/test_shapley.py",
    ),
    Fault(
        "the standard deviation instead of the standard error",
        "pruners/depth/shapley.py",
        "table.std(0) / math.sqrt(len(pairs))",
        "table.std(0)",
        "pruners/depth/test_shapley.py",
    ),
    Fault(
        "terms of both signs cancel in a score",
        "pruners/depth/shortened.py",
        "term.double().abs().sum()",
        "term.double().sum().abs()",
        "pruners/depth/test_shortened.py",
    ),
    Fault(
        "a trial that was stopped early may win",
        "pruners/depth/sleb.py",
        "if tried.samples is None and (best is None or",
        "if (best is None or",
        "pruners/depth/test_sleb.py",
    ),
    Fault(
        "a span of one layer too few",
        "pruners/depth/streamline.py",
        "span = wanted + 1",
        "span = wanted",
        "pruners/depth/test_streamline.py",
    ),
    Fault(
        "runs at the top of a join are counted twice",
        "pruners/depth/sublayer.py",
        "if not step.first <= run.first <= step.last)",
        "if not step.first <= run.first < step.last)",
        "pruners/depth/test_sublayer.py",
    ),
    Fault(
        "a window equal to the threshold merges",
        "pruners/depth/search/sliding.py",
        "good = tried.value > threshold",
        "good = tried.value >= threshold",
        "pruners/depth/search/test_sliding.py",
    ),
    Fault(
        "layer inputs of the former base model are used again",
        "pruners/depth/search/trials.py",
        "if base != self._base:",
        "if base and base != self._base:",
        "pruners/depth/search/test_trials.py",
    ),
    Fault(
        "a plan may remove every layer",
        "plans/check.py",
        "if removed >= plan.before.layers:",
        "if removed > plan.before.layers:",
        "plans/test_check.py",
    ),
    Fault(
        "a divergence is summed over tokens, not averaged",
        "pruners/depth/measures/criteria.py",
        "spread.view(entropies.shape)).mean(-1)",
        "spread.view(entropies.shape)).sum(-1)",
        "pruners/depth/measures/test_criteria.py",
    ),
    Fault(
        "the unbiased estimator's degrees of freedom",
        "pruners/depth/measures/cka.py",
        "((samples - 1) * (samples - 2))",
        "(samples * (samples - 2))",
        "pruners/depth/measures/test_cka.py",
    ),
    Fault(
        "batches of unequal size are weighted wrongly",
        "pruners/depth/measures/cka.py",
        "else samples * (samples - 3)",
        "else samples * (samples - 1)",
        "pruners/depth/measures/test_cka.py",
    ),
    Fault(
        "batches are counted instead of samples",
        "pruners/depth/measures/influence.py",
        "samples += len(batch.tokens)",
        "samples += len(captured[0].tokens)",
        "pruners/depth/test_block_influence.py",
    ),
    Fault(
        "query heads are assigned to KV groups by stride",
        "pruners/depth/measures/sensitivity.py",
        "columns.view(dimensions.kv_heads, -1).mean(-1)",
        "columns.view(-1, dimensions.kv_heads).mean(0)",
        "pruners/depth/test_merge_concat.py",
    ),
    Fault(
        "< for <= where a share of KV groups is a whole number",
        "pruners/width/budget.py",
        "if count <= share * current.kv_heads",
        "if count == 0 or count < share * current.kv_heads",
        "pruners/width/test_budget.py",
    ),
    Fault(
        "the norm of a magnitude is ignored",
        "pruners/width/importance.py",
        ".abs().pow(norm)",
        ".abs()",
        "pruners/width/test_importance.py",
    ),
    Fault(
        "small batches count as much as large ones",
        "pruners/gradients.py",
        "(loss * len(tokens)).backward()",
        "loss.backward()",
        "pruners/test_gradients.py",
    ),
    Fault(
        "a batch's first sample is ignored, so other samples are held out",
        "recovery/closed_form/least_squares.py",
        "torch.arange(start, start + len(features))",
        "torch.arange(len(features))",
        "recovery/closed_form/test_least_squares.py",
    ),
    Fault(
        "the ridge is relative to the sum of the diagonal",
        "recovery/closed_form/least_squares.py",
        "self.gram.diagonal().mean()",
        "self.gram.diagonal().sum()",
        "recovery/closed_form/test_least_squares.py",
    ),
    Fault(
        "the layer below a gap is not scaled",
        "recovery/closed_form/rescale.py",
        "if gap >= position",
        "if gap > position",
        "recovery/closed_form/test_rescale.py",
    ),
    Fault(
        "a map is folded without its transpose",
        "recovery/closed_form/fold_linear.py",
        "change.T @ values",
        "change @ values",
        "recovery/closed_form/test_fold_linear.py",
    ),
    Fault(
        "the target of a layer is the top of the next run",
        "recovery/closed_form/boundaries.py",
        "above[0][0] if above",
        "above[0][1] if above",
        "recovery/closed_form/test_compensation.py recovery/closed_form/test_refit.py",
    ),
    Fault(
        "the decay does not reach the lowest rate",
        "recovery/training/loop.py",
        "max(1, steps - warm)",
        "max(1, steps)",
        "recovery/training/test_loop.py",
    ),
    Fault(
        "the last epoch's weights are kept instead of the best",
        "recovery/training/streamline.py",
        "        _write(parameters, state)\n        return",
        "        return",
        "recovery/training/test_streamline.py",
    ),
    Fault(
        "gradients of all steps add up",
        "recovery/training/lora.py",
        "            optimizer.zero_grad(set_to_none=True)\n",
        "",
        "recovery/training/test_lora.py",
    ),
    Fault(
        "the mean is over positions that are not scored",
        "evaluation/perplexity.py",
        "pieces) / pieces[:, 1:].numel()",
        "pieces) / pieces.numel()",
        "evaluation/test_perplexity.py",
    ),
    Fault(
        "one special token at the end is removed, not all",
        "evaluation/perplexity.py",
        "while added and added[-1]:",
        "if added and added[-1]:",
        "evaluation/test_perplexity.py",
    ),
    Fault(
        "the warm-up is timed and the last runs are not",
        "evaluation/latency.py",
        "][options.warmup :]",
        "][: options.repeats]",
        "evaluation/test_latency.py",
    ),
    Fault(
        "a document of exactly the length is left out",
        "calibration/samples.py",
        "if len(ids) >= length:",
        "if len(ids) > length:",
        "calibration/test_samples.py",
    ),
    Fault(
        "what is left of a document is thrown away",
        "calibration/samples.py",
        "rest = rest[length:]",
        "rest = []",
        "calibration/test_samples.py",
    ),
    Fault(
        "biases are not counted",
        "models/view.py",
        "linear.in_features + (linear.bias is not None)",
        "linear.in_features",
        "models/test_view.py",
    ),
    Fault(
        "unscaled rotary frequencies are computed with half the exponents",
        "models/checkpoint.py",
        ".float() / (2 * len(computed))",
        ".float() / (4 * len(computed))",
        "models/test_checkpoint.py",
    ),
    Fault(
        "the ratio of a longrope is upside down",
        "models/rope.py",
        "abs(longest / original - factor)",
        "abs(original / longest - factor)",
        "models/test_rope.py",
    ),
    Fault(
        "keys are unpermuted with the number of query heads",
        "models/gguf/weights.py",
        '"attn_k": network.kv_heads}',
        '"attn_k": network.heads}',
        "models/test_gguf.py",
    ),
    Fault(
        "the attention of YaRN is scaled by another logarithm",
        "models/gguf/rope.py",
        "0.1 * math.log(factor)",
        "0.1 * math.log2(factor)",
        "models/test_gguf.py",
    ),
    Fault(
        "a changed file of the same size is not noticed",
        "outputs/marker.py",
        "(found.st_size, found.st_mtime_ns) if",
        "(found.st_size, 0) if",
        "outputs/test_marker.py",
    ),
    Fault(
        "an incomplete result is marked as complete",
        "outputs/claim.py",
        "mark(work.result, kind, incomplete=True)",
        "mark(work.result, kind)",
        "outputs/test_claim.py",
    ),
    Fault(
        "captured inputs of former weights are used again",
        "session.py",
        "if self._captured is None or changes(self._captured_from, state):",
        "if self._captured is None:",
        "test_session.py",
    ),
    Fault(
        "after two stages the sources are those of the last one",
        "session.py",
        "(former[first][0], former[last][1])",
        "(first, last)",
        "test_session.py",
    ),
)
