# ruff: noqa: E501 - a table reads better in one line a row
"""Recipes with one mistake each, and the line that a user must read.

Each entry changes the good recipe by replacing one text with another. ``{file}`` stands for the
recipe's path; the line must be the whole complaint or begin it.
"""

from __future__ import annotations

from typing import NamedTuple

GOOD = """\
version: 1
model: {id: smollm2-135m, dtype: float32}
calibration: {source: builtin, samples: 4, length: 32}
stages:
  - prune: slm
    target: {layers_removed: 2}
    merge_rule: telescoped
  - prune: torch_pruning
    target: {ratio: 0.1}
evaluate:
  - perplexity: {source: builtin, length: 64}
export:
  - checkpoint: {}
output: OUTPUT
"""


class Bad(NamedTuple):
    """One mistake: what to replace by what, and the beginning of the message."""

    name: str
    old: str
    new: str
    message: str


BAD = [
    Bad("not yaml", "model: {id", "model: {id: [", "{file}:2:"),
    Bad("a list", GOOD, "- version: 1\n", "{file}:1:1: a recipe is a mapping"),
    Bad("empty", GOOD, "", "{file}:1:1: version: the key 'version' is missing"),
    Bad("only text", GOOD, "hello\n", "{file}:1:1: a recipe is a mapping"),
    Bad("tab", "version: 1", "\tversion: 1", "{file}:1:1: not YAML"),
    Bad("version", "version: 1", "version: 2", "{file}:1:1: version: should be 1, not 2"),
    Bad("quoted version", "version: 1", "version: '1'", "{file}:1:1: version: should be 1, not '1'"),
    Bad("no model", "model:", "modle:", "{file}:1:1: model: the key 'model' is missing"),
    Bad("top key", "stages:", "stage:", "{file}:4:1: stage: unknown key 'stage'; did you mean 'stages'?"),
    Bad("twice", "output: OUTPUT", "output: OUTPUT\noutput: x", "{file}:15:1: output: the key 'output' is given twice"),
    Bad("no output", "output: OUTPUT\n", "", "{file}:1:1: output: the key 'output' is missing"),
    Bad("model key", "dtype: float32", "dtyp: float32", "{file}:2:27: model.dtyp: unknown key 'dtyp'; did you mean 'dtype'?"),
    Bad("dtype", "float32", "float8", "{file}:2:27: model.dtype: should be 'auto', 'float32', 'bfloat16' or 'float16', not 'float8'"),
    Bad("device", "dtype: float32", "device: gpu", "{file}:2:27: model.device: "),
    Bad("memory", "dtype: float32", "memory: none", "{file}:2:27: model.memory: should be 'whole' or 'layerwise', not 'none'"),
    Bad("model is text", "{id: smollm2-135m, dtype: float32}", "smollm2-135m", "{file}:2:1: model: should be a mapping of keys to values"),
    Bad("samples", "samples: 4", "samples: 0", "{file}:3:32: calibration.samples: should be greater than or equal to 1, not 0"),
    Bad("samples text", "samples: 4", "samples: four", "{file}:3:32: calibration.samples: should be a valid integer, not 'four'"),
    Bad("samples yes", "samples: 4", "samples: yes", "{file}:3:32: calibration.samples: should be a valid integer, not 'yes'"),
    Bad("calibration file", "source: builtin, samples", "source: nowhere.txt, samples", "{file}:3:15: calibration.source: there is no file nowhere.txt"),
    Bad("sampling", "length: 32}", "sampling: cut}", "{file}:3:44: calibration.sampling: should be 'crop' or 'pack', not 'cut'"),
    Bad("calibration needed", "calibration: {source: builtin, samples: 4, length: 32}\n", "", "{file}:4:5: stages.0: 'slm' needs calibration data"),
    Bad("stage kind", "- prune: slm", "- prone: slm", "{file}:5:5: stages.0: a stage has exactly one of prune: and recover:; did you mean 'prune:'?"),
    Bad("stage is text", "  - prune: slm\n    target: {layers_removed: 2}\n    merge_rule: telescoped\n", "  - slm\n", "{file}:5:5: stages.0: a stage is a mapping"),
    Bad("two verbs", "    merge_rule: telescoped", "    recover: lora", "{file}:5:5: stages.0: a stage has exactly one of"),
    Bad("pruner", "prune: slm", "prune: sml", "{file}:5:5: stages.0.prune: no pruner is called 'sml' (did you mean 'slm'?)"),
    Bad("recovery", "prune: torch_pruning\n    target: {ratio: 0.1}", "recover: lore", "{file}:8:5: stages.1.recover: no recovery is called 'lore' (did you mean 'lora'?)"),
    Bad("option", "merge_rule:", "merge_rul:", "{file}:7:5: stages.0.merge_rul: unknown key 'merge_rul'; did you mean 'merge_rule'?"),
    Bad("merge rule", "telescoped", "average", "{file}:7:5: stages.0.merge_rule: no merge rule is called 'average'"),
    Bad("merge rule of repaired", "slm\n    target: {layers_removed: 2}\n    merge_rule: telescoped", "repaired\n    target: {layers_removed: 2}\n    merge_rules: [joined]", "{file}:7:19: stages.0.merge_rules.0: no merge rule is called 'joined'; rules: telescoped, rdsc, mean, keep_low, keep_high, ema(w), activation, best with w from 0 to 1, or join"),
    Bad("start without polish", "slm\n    target: {layers_removed: 2}\n    merge_rule: telescoped", "repaired\n    target: {layers_removed: 2}\n    start: {prune: deepest}", "{file}:5:5: stages.0: `start` is the plan to polish: set `polish` to a number of exchanges"),
    Bad("start of no name", "slm\n    target: {layers_removed: 2}\n    merge_rule: telescoped", "repaired\n    target: {layers_removed: 2}\n    polish: 4\n    start: {prune: deepst}", "{file}:8:5: stages.0.start: no pruner is called 'deepst' (did you mean 'deepest'?)"),
    Bad("start that merges", "slm\n    target: {layers_removed: 2}\n    merge_rule: telescoped", "repaired\n    target: {layers_removed: 2}\n    polish: 4\n    start: {prune: laco}", "{file}:8:5: stages.0.start: 'laco' does more than drop whole layers, and only those can be exchanged"),
    Bad("option that a start lacks", "slm\n    target: {layers_removed: 2}\n    merge_rule: telescoped", "repaired\n    target: {layers_removed: 2}\n    polish: 4\n    start: {prune: sleb, protect_fist: 1}", "{file}:8:5: stages.0.start: 'sleb' has no option 'protect_fist'; did you mean 'protect_first'?"),
    Bad("start with a target", "slm\n    target: {layers_removed: 2}\n    merge_rule: telescoped", "repaired\n    target: {layers_removed: 2}\n    polish: 4\n    start: {prune: deepest, target: {ratio: 0.1}}", "{file}:8:5: stages.0.start: the target of this stage is that of its start too; leave it out here"),
    Bad("start with a wrong option", "slm\n    target: {layers_removed: 2}\n    merge_rule: telescoped", "repaired\n    target: {layers_removed: 2}\n    polish: 4\n    start: {prune: sleb, protect_first: -1}", "{file}:8:5: stages.0.start: protect_first: Input should be greater than or equal to 0"),
    Bad("no target", "    target: {layers_removed: 2}\n", "", "{file}:5:5: stages.0: the key 'target' is missing"),
    Bad("two targets", "{layers_removed: 2}", "{layers_removed: 2, ratio: 0.1}", "{file}:6:5: stages.0.target: give exactly one of"),
    Bad("empty target", "{layers_removed: 2}", "{}", "{file}:6:5: stages.0.target: give exactly one of"),
    Bad("no layers", "{layers_removed: 2}", "{layers_removed: 0}", "{file}:6:14: stages.0.target.layers_removed: should be greater than or equal to 1, not 0"),
    Bad("ratio above one", "{layers_removed: 2}", "{ratio: 1.5}", "{file}:6:14: stages.0.target.ratio: should be less than 1, not 1.5"),
    Bad("ratio in percent", "{layers_removed: 2}", "{ratio: 20%}", "{file}:6:14: stages.0.target.ratio: should be a valid number, not '20%'"),
    Bad("negative ratio", "{layers_removed: 2}", "{ratio: -0.1}", "{file}:6:14: stages.0.target.ratio: should be greater than 0, not -0.1"),
    Bad("parameters", "{layers_removed: 2}", "{parameters: many}", "{file}:6:14: stages.0.target.parameters: should be a valid integer"),
    Bad("memory", "{layers_removed: 2}", "{memory: 300 apples}", "{file}:6:14: stages.0.target.memory: should be a valid integer"),
    Bad("no memory", "{layers_removed: 2}", "{memory: 0}", "{file}:6:14: stages.0.target.memory: should be greater than or equal to 1, not 0"),
    Bad("latency of what", "{layers_removed: 2}", "{latency: 0.8}", "{file}:6:14: stages.0.target.latency: should be a mapping of keys to values"),
    Bad("latency of nothing", "{layers_removed: 2}", "{latency: {}}", "{file}:6:14: stages.0.target.latency: give exactly one of prefill, decode; found none"),
    Bad("latency of both", "{layers_removed: 2}", "{latency: {prefill: 0.7, decode: 0.8}}", "{file}:6:14: stages.0.target.latency: give exactly one of prefill, decode; found both"),
    Bad("latency key", "{layers_removed: 2}", "{latency: {decoding: 0.8}}", "{file}:6:24: stages.0.target.latency.decoding: unknown key 'decoding'; did you mean 'decode'?"),
    Bad("latency above one", "{layers_removed: 2}", "{latency: {decode: 1.2}}", "{file}:6:24: stages.0.target.latency.decode: should be less than 1, not 1.2"),
    Bad("latency of no use", "{layers_removed: 2}", "{latency: {decode: 0.8}}", "{file}:6:14: stages.0.target.latency: slm takes no target of kind 'latency'; it takes: threshold, layers_removed, ratio, parameters"),
    Bad("memory of no use", "{ratio: 0.1}", "{memory: 300MB}", "{file}:9:14: stages.1.target.memory: torch_pruning takes no target of kind 'memory'; it takes: ratio, parameters"),
    Bad("idle of memory", "{layers_removed: 2}", "{memory: 300MB, of: current}", "{file}:6:5: stages.0.target: `of` only says"),
    Bad("idle of", "{layers_removed: 2}", "{layers_removed: 2, of: current}", "{file}:6:5: stages.0.target: `of` only says"),
    Bad("target kind", "target: {ratio: 0.1}", "target: {layers_removed: 1}", "{file}:9:14: stages.1.target.layers_removed: torch_pruning takes no target of kind"),
    Bad("ratios", "{layers_removed: 2}", "{ratio: 0.95}", "{file}:4:1: stages: the ratios add up to 105%"),
    Bad("importance", "target: {ratio: 0.1}", "target: {ratio: 0.1}\n    importance: tailor", "{file}:10:5: stages.1.importance: should be 'magnitude' or 'taylor', not 'tailor'"),
    Bad("an option of earlier versions", "target: {ratio: 0.1}", "target: {ratio: 0.1}\n    norm: 1", "{file}:10:5: stages.1.norm: 'norm' is no option any more: remove it; magnitude sums the squares"),
    Bad("an option of the released code alone", "{layers_removed: 2}", "{layers_removed: 2}\n    flush_tail: false", "{file}:7:5: stages.0.flush_tail: 'flush_tail' is no option any more: remove it; a window that is still growing at the bottom is merged unless `compatibility: released` is set"),
    Bad("evaluator", "perplexity:", "perplexty:", "{file}:11:5: evaluate.0.perplexty: no evaluator is called 'perplexty' (did you mean 'perplexity'?)"),
    Bad("evaluator option", "length: 64", "lenght: 64", "{file}:11:35: evaluate.0.perplexity.lenght: unknown key 'lenght'; did you mean 'length'?"),
    Bad("evaluation file", "perplexity: {source: builtin", "perplexity: {source: gone.txt", "{file}:11:18: evaluate.0.perplexity.source: there is no file gone.txt"),
    Bad("two evaluators in one", "- perplexity: {source: builtin, length: 64}", "- {perplexity: {}, latency: {}}", "{file}:11:5: evaluate.0: an entry names one evaluator"),
    Bad("exporter", "checkpoint:", "checkpiont:", "{file}:13:5: export.0.checkpiont: no exporter is called 'checkpiont' (did you mean 'checkpoint'?)"),
    Bad("exporter option", "checkpoint: {}", "checkpoint: {shards: 3}", "{file}:13:18: export.0.checkpoint.shards: unknown key 'shards'"),
    Bad("stages is a mapping", "  - prune: slm\n    target: {layers_removed: 2}\n    merge_rule: telescoped\n  - prune: torch_pruning\n    target: {ratio: 0.1}\n", "  prune: slm\n", "{file}:4:1: stages: should be a list"),
    Bad("seed", "output: OUTPUT", "output: OUTPUT\nseed: -1", "{file}:15:1: seed: should be greater than or equal to 0, not -1"),
    Bad("python tag", "id: smollm2-135m", "id: !!python/object/apply:os.system [ls]", "{file}:2:9: model.id: the tag '!!python/object/apply:os.system' is not read here"),
    Bad("opset", "checkpoint: {}", "onnx: {opset: 99}", "{file}:13:12: export.0.onnx.opset: should be less than or equal to 20, not 99"),
    Bad("tolerance", "checkpoint: {}", "onnx: {tolerance: 1e308}", "{file}:13:12: export.0.onnx.tolerance: should be less than or equal to 1"),
    Bad("no shard", "checkpoint: {}", "checkpoint: {max_shard_size: 0.0MB}", "{file}:13:18: export.0.checkpoint.max_shard_size: '0.0MB' holds no tensor; give"),
    Bad("binary unit", "checkpoint: {}", "checkpoint: {max_shard_size: 5GiB}", "{file}:13:18: export.0.checkpoint.max_shard_size: should be a size as 5GB"),
    Bad("vast shard", "checkpoint: {}", f"checkpoint: {{max_shard_size: {'7' * 400}KB}}", "{file}:13:18: export.0.checkpoint.max_shard_size: should be a size as 5GB, 500MB or 64KB, not '777"),
    Bad("other digits", "checkpoint: {}", "checkpoint: {max_shard_size: \u0665GB}", "{file}:13:18: export.0.checkpoint.max_shard_size: should be a size as"),
    Bad("other digits of a device", "dtype: float32", "device: cuda:\u0661", "{file}:2:27: model.device: should be auto, cpu, mps, cuda or as cuda:1"),
    Bad("other digits of a rule", "telescoped", "ema(\u0660.\u0665)", "{file}:7:5: stages.0.merge_rule: no merge rule is called"),
    Bad("threshold above", "{layers_removed: 2}", "{threshold: 1e308}", "{file}:6:14: stages.0.target.threshold: threshold 1e+308 is outside the range of flat_cosine (give a threshold from -1 to 1)"),
    Bad("threshold below", "{layers_removed: 2}", "{threshold: -0.1}\n    criterion: cka", "{file}:6:14: stages.0.target.threshold: threshold -0.1 is outside the range of cka (give a threshold from 0 to 1)"),
    Bad("positive divergence", "slm\n    target: {layers_removed: 2}\n    merge_rule: telescoped", "laco\n    target: {threshold: 0.1}\n    criterion: logit_kl", "{file}:6:14: stages.0.target.threshold: threshold 0.1 is outside the range of logit_kl (give a threshold of at most 0)"),
    Bad("budget of a threshold", "{layers_removed: 2}", "{threshold: 0.5}\n    search: budgeted", "{file}:6:14: stages.0.target.threshold: search: budgeted needs a size"),
    Bad("released size", "merge_rule: telescoped", "compatibility: released", "{file}:6:14: stages.0.target.layers_removed: the released code supports only a threshold"),
    Bad("harness seed", "perplexity: {source: builtin, length: 64}", "lm_eval: {tasks: [builtin_continuation], seed: -1}", "{file}:11:46: evaluate.0.lm_eval.seed: should be greater than or equal to 0, not -1"),
    Bad("no include_path", "perplexity: {source: builtin, length: 64}", "lm_eval: {tasks: [builtin_continuation], include_path: ''}", "{file}:11:46: evaluate.0.lm_eval.include_path: "),
    Bad("own text", "perplexity: {source: builtin, ", "perplexity: {source: self, ", "{file}:11:"),
    Bad("vast batch", "prune: torch_pruning\n    target: {ratio: 0.1}", "recover: lora\n    batch_size: 4611686018427387904", "{file}:9:5: stages.1.batch_size: should be less than or equal to 10000000"),
    Bad("vast rank", "prune: torch_pruning\n    target: {ratio: 0.1}", "recover: lora\n    rank: 4611686018427387904", "{file}:9:5: stages.1.rank: should be less than or equal to 65536"),
    Bad("vast length", "length: 64", "length: 4611686018427387904", "{file}:11:35: evaluate.0.perplexity.length: should be less than or equal to 10000000"),
    Bad("no such folder", "id: smollm2-135m", "id: /nowhere/x", "{file}:2:9: model.id: there is no folder /nowhere/x"),
    Bad("no such folder below", "id: smollm2-135m", "id: ./nowhere", "{file}:2:9: model.id: there is no folder nowhere"),
    Bad("no such gguf", "id: smollm2-135m", "id: nowhere/q4.gguf", "{file}:2:9: model.id: there is no file nowhere/q4.gguf"),
    Bad("model is a file", "id: smollm2-135m", f"id: {__file__}", f"{{file}}:2:9: model.id: {__file__} is neither a checkpoint folder nor a .gguf file"),
    Bad("version is true", "version: 1", "version: true", "{file}:1:1: version: should be 1, not true"),
    Bad("version is a float", "version: 1", "version: 1.0", "{file}:1:1: version: should be 1, not 1.0"),
    Bad("count is true", "target: {ratio: 0.1}", "target: {ratio: 0.1}\n    multiple_of: true", "{file}:10:5: stages.1.multiple_of: should be"),
    Bad("groups", "target: {ratio: 0.1}", "target: {ratio: 0.1}\n    kv_groups: some", "{file}:10:5: stages.1.kv_groups: should be a valid integer or 'auto', not 'some'"),
    Bad("negative groups", "target: {ratio: 0.1}", "target: {ratio: 0.1}\n    kv_groups: -2", "{file}:10:5: stages.1.kv_groups: should be greater than or equal to 0, not -2"),
    Bad("a number as evaluator", "- perplexity: {source: builtin, length: 64}", "- 3", "{file}:11:5: evaluate.0: an entry names one evaluator"),
    Bad("null", "samples: 4", "sampling: null", "{file}:3:32: calibration.sampling: should be 'crop' or 'pack', not null"),
    Bad("a number as text", "source: builtin, samples", "source: 5, samples", "{file}:3:15: calibration.source: should be a text, not 5"),
    Bad("a comparison", "stages:", "methods:", "{file}:1:1: no recipe: a file with `methods` is for `slm-plugin compare`"),
    Bad("no boolean", "prune: slm\n    target: {layers_removed: 2}\n    merge_rule: telescoped", "prune: shortened\n    target: {layers_removed: 2}\n    keep_list: 1", "{file}:7:5: stages.0.keep_list: should be true or false, not 1"),
    Bad("a number as task", "perplexity: {source: builtin, length: 64}", "lm_eval: {tasks: [3]}", "{file}:11:23: evaluate.0.lm_eval.tasks.0: should be a text, not 3"),
    Bad("no tasks", "perplexity: {source: builtin, length: 64}", "lm_eval: {tasks: []}", "{file}:11:15: evaluate.0.lm_eval.tasks: should not be an empty list"),
    Bad("no include_path at all", "perplexity: {source: builtin, length: 64}", "lm_eval: {tasks: [builtin_continuation], include_path: /nowhere}", "{file}:11:46: evaluate.0.lm_eval.include_path: the lm_eval include_path /nowhere is not a folder"),
    Bad("no such task", "perplexity: {source: builtin, length: 64}", "lm_eval: {limit: 3, tasks: [hellaswog]}", "{file}:11:25: evaluate.0.lm_eval.tasks: lm-eval knows no task"),
    Bad("decimal comma", "{ratio: 0.1}", "{ratio: 0,1}", "{file}:9:23: stages.1.target: a comma separates keys; write 0.1"),
    Bad("decimal comma of a line", "{ratio: 0.1}", "\n      ratio: 0,125", "{file}:10:7: stages.1.target.ratio: should be a valid number, not '0,125'; write 0.125"),
    Bad("zeros", "{ratio: 0.1}", "{parameters: '010'}", "{file}:9:14: stages.1.target.parameters: should be a valid integer, not '010'"),
    Bad("own alias", "calibration: {", "calibration: &a {source: *a, ", "{file}:"),
    Bad("after an allocation", "prune: slm\n    target: {layers_removed: 2}\n    merge_rule: telescoped", "prune: width\n    target: {ratio: 0.1}\n    allocation: atp", "{file}:8:5: stages.1: 'torch_pruning' needs layers of one width and cannot follow 'width' with an `allocation`; move it before that stage"),
    Bad("pooled ranks", "prune: slm\n    target: {layers_removed: 2}\n    merge_rule: telescoped", "prune: width\n    target: {ratio: 0.1}\n    score: obs\n    allocation: global", "{file}:5:5: stages.0: score obs ranks the channels of one layer and cannot be compared between layers; choose another score or allocation"),
    Bad("idle spread", "prune: slm\n    target: {layers_removed: 2}\n    merge_rule: telescoped", "prune: width\n    target: {ratio: 0.1}\n    spread: 0.2", "{file}:5:5: stages.0: spread has no effect with allocation uniform; leave it out, or choose"),
    Bad("spread", "prune: slm\n    target: {layers_removed: 2}\n    merge_rule: telescoped", "prune: width\n    target: {ratio: 0.1}\n    allocation: owl\n    spread: 1", "{file}:8:5: stages.0.spread: should be less than 1, not 1"),
    Bad("allocation", "prune: slm\n    target: {layers_removed: 2}\n    merge_rule: telescoped", "prune: width\n    target: {ratio: 0.1}\n    allocation: alfa", "{file}:7:5: stages.0.allocation: should be 'alpha', 'alpha_peak', 'atp', 'global', 'influence', 'layer_redundancy', 'owl' or 'uniform', not 'alfa'"),
]  # fmt: skip
