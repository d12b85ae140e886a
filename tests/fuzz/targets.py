"""What is fuzzed: each kind makes a damaged input and gives it to what a command would call."""

from __future__ import annotations

import copy
import json
import math
import random
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import yaml

from slm_plugin import apply
from slm_plugin.cache import Store
from slm_plugin.cli.app import quiet_libraries
from slm_plugin.comparison.cache import CellCache, is_cell, is_plan
from slm_plugin.comparison.configuration import read_either
from slm_plugin.comparison.record import Cell, Cost, Planned
from slm_plugin.evaluation.base import Measurement
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.plans import KeepChannels, PruningPlan
from slm_plugin.plans.operations import by_kind
from slm_plugin.plans.steps import remaining_layers
from slm_plugin.pruners.depth.search.journal import Journal, is_part
from slm_plugin.pruners.depth.search.runs import Run
from slm_plugin.registry import pruners
from slm_plugin.report.explain import explain
from slm_plugin.session import Session
from slm_plugin.target import Target
from tests.comparison import test_configuration
from tests.fuzz.mutations import ODD, as_json, damaged
from tests.recipe.bad_recipes import GOOD
from tests.tiny import make_model, make_tokenizer, random_tokens


class Kind(ABC):
    """One kind of input.

    Args:
        folder: For the files that it writes.
    """

    name: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def make(self, rng: random.Random) -> bytes:
        """A damaged input."""

    @abstractmethod
    def use(self, content: bytes) -> bool:
        """Use it as a command would; whether it was taken.

        Raises:
            SlmError: It is refused.
        """


class Recipes(Kind):
    """Recipes and comparisons, as `validate` reads them."""

    name = "recipes"
    extra = """\
version: 1
model: {id: m, dtype: auto, device: cpu, memory: whole}
calibration: {source: self, samples: 4, length: 32, seed: 3, sampling: pack, text_field: text}
stages:
  - {prune: slm, target: {threshold: 0.5}, criterion: loss, search: greedy, beam_width: 2}
  - {prune: sleb, target: {ratio: 0.2, of: current}, criterion: logit_kl}
  - {recover: refit}
  - {recover: lora, epochs: 1, learning_rate: 1.0e-4}
evaluate: [latency, {perplexity: {length: 64, every_stage: true, join: rows}}]
export: [checkpoint]
output: ~/out
seed: 5
"""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        texts = (GOOD, test_configuration.GOOD, self.extra)
        self.seeds = [yaml.safe_load(text) for text in texts]

    def make(self, rng: random.Random) -> bytes:
        """See `Kind.make`."""
        flow = rng.choice((None, True, False))
        return damaged(
            rng,
            self.seeds,
            lambda tree: yaml.safe_dump(tree, default_flow_style=flow, allow_unicode=True),
        )

    def use(self, content: bytes) -> bool:
        """See `Kind.use`."""
        file = self.folder / "recipe.yaml"
        file.write_bytes(content)
        read_either(file)
        return True


class Overrides(Recipes):
    """Values and paths of ``--set``."""

    name = "overrides"

    def make(self, rng: random.Random) -> bytes:
        """See `Kind.make`."""
        paths = (
            "model.id",
            "stages.0.target",
            "stages.1",
            "seed",
            "a.b.c",
            "stages.-1",
            "evaluate",
        )
        path = rng.choice((*paths, "", "stages.9.x", "stages.²", "x" * 9000, ".", "a" + ".a" * 50))
        if rng.random() < 0.5:
            return f"{path}=".encode() + damaged(rng, [rng.choice(ODD)], as_json)
        return f"{path}=".encode() + super().make(rng)

    def use(self, content: bytes) -> bool:
        """See `Kind.use`."""
        file = self.folder / "recipe.yaml"
        file.write_text(GOOD)
        read_either(file, [content.decode("utf-8", "surrogateescape")])
        return True


class Configs(Kind):
    """The JSON files of a checkpoint, as every command loads them."""

    name = "configs"
    files = (
        *("config.json", "generation_config.json", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        quiet_libraries()
        self.model = folder / "model"
        # Small shards, so that there is an index.
        make_model(num_hidden_layers=2).save_pretrained(self.model, max_shard_size="80KB")
        make_tokenizer().save_pretrained(self.model)
        there = [name for name in self.files if (self.model / name).is_file()]
        self.seeds = {name: (self.model / name).read_text() for name in there}

    def make(self, rng: random.Random) -> bytes:
        """See `Kind.make`."""
        # The config decides most.
        name = rng.choice((*self.seeds, "config.json", "config.json"))
        content = damaged(rng, [json.loads(self.seeds[name])], as_json)
        return name.encode() + b"\n" + content

    def use(self, content: bytes) -> bool:
        """See `Kind.use`."""
        name, _, text = content.partition(b"\n")
        try:
            (self.model / name.decode()).write_bytes(text)
            load(ModelSource(id=str(self.model), dtype="float32", device="cpu"))
        finally:
            (self.model / name.decode()).write_text(self.seeds[name.decode()])
        return True


class Plans(Kind):
    """Plans, as `explain` and `apply` take them."""

    name = "plans"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.session = Session(make_model(num_hidden_layers=4), calibration=random_tokens())
        self.seeds = [json.loads(plan.to_json()) for plan in some_plans(self.session)]

    def make(self, rng: random.Random) -> bytes:
        """See `Kind.make`."""
        return damaged(rng, self.seeds, as_json)

    def use(self, content: bytes) -> bool:
        """See `Kind.use`."""
        file = self.folder / "plan.json"
        file.write_bytes(content)
        plan = PruningPlan.read(file)
        made = explain(plan)
        assert made.text
        plan.to_json()
        cut = plan.upto(1) if plan.kind != "width" and plan.operations else plan
        for each in (plan, cut):
            session = Session(copy.deepcopy(self.session.model))
            apply(each, session)
        return True


class Journals(Kind):
    """Journals of trials, as a search opens them."""

    name = "journals"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        file = folder / "seed.jsonl"
        journal = Journal(Store(file, "about", is_part))
        for number in range(6):
            runs = (Run(number, number + 1, "mean"), Run(9, 9, "drop"))
            journal.add(runs, [0.5, number / 7])
            journal.add(runs, [0.25])
        self.lines = [json.loads(line) for line in file.read_text().splitlines()]
        self.truth = {json.dumps(line) for line in self.lines}

    def make(self, rng: random.Random) -> bytes:
        """See `Kind.make`."""
        lines = [json.dumps(line).encode() for line in self.lines]
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(len(lines))
            kind = rng.randrange(4)
            if kind == 0:
                lines[at] = damaged(rng, self.lines, as_json)
            elif kind == 1:
                lines.insert(at, rng.choice(lines))
            elif kind == 2:
                rng.shuffle(lines)
            else:
                lines[at] = lines[at][: rng.randrange(len(lines[at]))]
        return b"\n".join(lines) + rng.choice((b"\n", b""))

    def use(self, content: bytes) -> bool:
        """See `Kind.use`."""
        file = self.folder / "journal.jsonl"
        file.write_bytes(content)
        journal = Journal(Store(file, "about", is_part))
        for number in range(6):
            runs = (Run(number, number + 1, "mean"), Run(9, 9, "drop"))
            parts = journal.cached(runs)
            assert parts in ([], [[0.5, number / 7]], [[0.5, number / 7], [0.25]]), parts
            if not parts:
                journal.add(runs, [0.5, number / 7])
        assert journal.read_from_disk <= 6
        aside = list(self.folder.glob("journal.jsonl.damaged-*"))
        for one in aside:
            one.unlink()
        del journal
        again = Journal(Store(file, "about", is_part))
        assert again.read_from_disk == 6, "what was written is found again"
        return not aside


class Cells(Kind):
    """Cached plans and cells of comparisons."""

    name = "cells"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.session = Session(make_model(num_hidden_layers=4), calibration=random_tokens())
        plan = next(iter(some_plans(self.session)))
        self.facts: dict[str, Any] = {
            "method": plan.pruner,
            "options": plan.model_dump(mode="json")["options"],
            "target": plan.target.model_dump(mode="json"),
        }
        cost = Cost(seconds=1.5, memory=10)
        figure = Measurement(name="perplexity", value=math.inf, protocol="p", better="lower")
        self.planned = Planned(plan=plan, cost=cost)
        self.blank = Cell(label="x", **{**self.facts, "target": plan.target})
        self.cell = self.blank.model_copy(
            update={"planning": cost, "measured": {"a": (figure, figure)}}
        )
        cache = CellCache.of(folder / "cells", {"seed": 1})
        cache.add(self.planned, self.facts)
        cache.add(self.cell, self.facts)
        (self.file,) = (folder / "cells").iterdir()
        self.lines = [json.loads(line) for line in self.file.read_text().splitlines()]

    def make(self, rng: random.Random) -> bytes:
        """See `Kind.make`."""
        lines = [json.dumps(line).encode() for line in self.lines]
        at = rng.randrange(len(lines))
        lines[at] = damaged(rng, [copy.deepcopy(self.lines[at])], as_json)
        return b"\n".join(lines) + b"\n"

    def use(self, content: bytes) -> bool:
        """See `Kind.use`."""
        self.file.write_bytes(content)
        cache = CellCache.of(self.file.parent, {"seed": 1})
        cell = cache.find(Cell, self.facts, lambda c: is_cell(c, self.blank))
        planned = cache.find(Planned, self.facts, lambda p: is_plan(p, self.facts, self.session))
        right = cell in (None, self.cell) and planned in (None, self.planned)
        assert right, "a cached result was taken that is not the one that was kept"
        assert cell is not None or planned is not None, "the other line is whole"
        aside = list(self.file.parent.glob("*.damaged-*"))
        for one in aside:
            one.unlink()
        found = cell is not None and planned is not None
        assert bool(aside) or found
        return found


def some_plans(session: Session) -> list[PruningPlan]:
    """Plans of several strategies, with operations of every kind."""
    asked: tuple[tuple[str, dict[str, Any], Target], ...] = (
        ("slm", {"search": "greedy", "merge_rule": "mean"}, Target(layers_removed=2)),
        ("deepest", {}, Target(layers_removed=2)),
        ("sublayer", {}, Target(layers_removed=1)),
        ("merge_concat", {}, Target(layers_removed=1)),
        ("torch_pruning", {"importance": "magnitude"}, Target(ratio=0.1)),
    )
    made = []
    for name, options, target in asked:
        kind = pruners.get(name)
        made.append(kind(kind.Options(**options), target).plan(session))
    return [*made, _in_two_parts(made[0])]


def _in_two_parts(merges: PruningPlan) -> PruningPlan:
    """A depth plan that then halves the channels of the layers that are left."""
    before, channels = merges.before, range(0, merges.before.intermediate_size, 2)
    left = remaining_layers(by_kind(merges.operations)[0], before.layers)
    narrower = tuple(KeepChannels(layer=layer, indices=tuple(channels)) for layer in left)
    changes = {
        "pruner": "in_two_parts",
        "kind": "hybrid",
        "target": Target(ratio=0.5),
        "operations": (*merges.operations, *narrower),
        "after": merges.after.without_units(channels=before.intermediate_size - len(channels)),
    }
    return merges.model_copy(update=changes)


KINDS: dict[str, type[Kind]] = {
    kind.name: kind for kind in (Recipes, Overrides, Configs, Plans, Journals, Cells)
}
