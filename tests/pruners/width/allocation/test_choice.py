"""`width` with an allocation: plans with layers of different widths, and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

pytest.importorskip("torch_pruning")

from slm_plugin.errors import CalibrationError, TargetError, UnsupportedModelError
from slm_plugin.plans import KeepChannels, PruningPlan
from slm_plugin.pruners.depth.deepest import Deepest
from slm_plugin.pruners.input_sums import layer_inputs
from slm_plugin.pruners.width.allocation.choice import STRETCHED, WITHOUT_DATA, AllocationName
from slm_plugin.pruners.width.brain_surgeon import error_curve
from slm_plugin.pruners.width.input_scores import contribution
from slm_plugin.pruners.width.torch_pruning import TorchPruning
from slm_plugin.pruners.width.width import Width
from slm_plugin.pruners.width.width_options import WidthOptions
from slm_plugin.recovery.closed_form.refit import Refit, RefitOptions
from slm_plugin.session import Session
from slm_plugin.target import Target
from tests.tiny import command, make_checkpoint, make_model, random_tokens

TOKENS = random_tokens(6, 12)
NAMES = get_args(AllocationName)


def width(allocation: str, ratio: float = 0.25, **options: Any) -> Width:
    """The strategy with small steps."""
    given = {"allocation": allocation, "multiple_of": 2, **options}
    return Width(WidthOptions.model_validate(given), Target(ratio=ratio))


def session_of(**options: Any) -> Session:
    """A tiny model with calibration data."""
    return Session(make_model(**options), calibration=TOKENS, batch_tokens=36)


def counts(plan: PruningPlan) -> list[int]:
    """Channels that the layers keep."""
    return [len(op.kept) for op in plan.operations if isinstance(op, KeepChannels)]


@pytest.mark.parametrize("allocation", NAMES)
def test_every_allocation_plans_what_is_applied(allocation: str) -> None:
    """The size is met to half a step of one layer, and every layer keeps its best channels."""
    session = session_of()
    plan = session.plan(width(allocation, score="wanda_sp", kv_groups=1))
    wanted = 0.25 * session.original.parameters
    step = (6 if allocation == "uniform" else 1) * 2 * 96
    assert abs(plan.parameters_removed - wanted) <= step / 2
    assert tuple(counts(plan)) == plan.after.widths
    assert (len(set(counts(plan))) > 1) == (allocation != "uniform")
    kept = {op.layer: {*op.kept} for op in plan.operations if isinstance(op, KeepChannels)}
    for one in plan.scores:
        if one.unit == "mlp_channel":
            ranked = sorted(range(48), key=one.scores.__getitem__)
            assert {*ranked[-len(kept[one.layer]) :]} == kept[one.layer]
    assert PruningPlan.parse(plan.to_json()) == plan
    session.apply(plan)
    assert session.view.dimensions() == plan.after
    assert any("pads" in one for one in plan.warnings) == (allocation != "uniform")


def test_contribution_is_that_of_the_own_count() -> None:
    """Every layer is scored for its own number of removed channels."""
    session = session_of()
    plan = session.plan(width("alpha", score="contribution"))
    assert len(set(counts(plan))) > 1
    for one, kept, layer in zip(plan.scores, counts(plan), layer_inputs(session), strict=True):
        wanted = contribution(layer.read_by("down_proj"), 48 - kept)
        assert one.scores == pytest.approx(wanted.tolist(), rel=1e-6)


@pytest.mark.parametrize("restore", ["none", "own"])
def test_obs_sees_layers_below_at_their_own_widths(restore: str) -> None:
    """Its scores of a layer are those of a model whose lower layers are cut, and restored."""
    plan = session_of().plan(width("alpha", score="obs", restore=restore))
    assert len(set(counts(plan))) > 1
    session = session_of()
    session.keeps_layers = True
    first = next(layer_inputs(session))
    wanted = error_curve(first.read_by("down_proj"), 48 - counts(plan)[0], size=1)
    assert plan.scores[0].scores == pytest.approx(wanted.tolist(), rel=1e-6)
    session.keep_reference()
    session.apply(plan)
    if restore == "own":
        session.recover(Refit(RefitOptions(toward="own")))
    whole = session_of().view.layers[1]
    session.view.layers[1].mlp = whole.mlp
    last = list(itertools.islice(layer_inputs(session), 2))[1]
    wanted = error_curve(last.read_by("down_proj"), 48 - counts(plan)[1], size=1)
    assert plan.scores[1].scores == pytest.approx(wanted.tolist(), rel=1e-5)


def test_without_spread_the_layers_are_equal() -> None:
    """Exactly the uniform plan, where its size can be met by equal layers."""
    even = session_of().plan(width("uniform"))
    for allocation in STRETCHED:
        plan = session_of().plan(
            Width(
                WidthOptions.model_validate(
                    {"allocation": allocation, "spread": 0, "multiple_of": 2}
                ),
                Target(parameters=even.after.parameters),
            )
        )
        assert plan.operations == even.operations and not plan.after.layer_widths


def test_a_wider_spread_takes_layers_further_apart() -> None:
    """And keeps their order."""
    narrow, wide = (
        session_of().plan(width("alpha", spread=spread, multiple_of=1)) for spread in (0.2, 0.6)
    )
    near, far = counts(narrow), counts(wide)
    assert max(far) - min(far) > 2 * (max(near) - min(near))
    order = sorted(range(6), key=near.__getitem__)
    assert [far[layer] for layer in order] == sorted(far)


def test_a_floor_holds() -> None:
    """The others give what the layer at its floor does not."""
    free = session_of().plan(width("atp", ratio=0.4))
    held = session_of().plan(width("atp", ratio=0.4, floor=0.2))
    assert min(counts(held)) >= 10 and sum(counts(free)) == sum(counts(held))
    with pytest.raises(TargetError, match=r"floor 0.9 and multiple_of 2 keep at least"):
        session_of().plan(width("alpha", floor=0.9))


def test_what_needs_no_data_works_without() -> None:
    """Told before any work where it is needed."""
    for allocation in NAMES:
        pruner, session = (
            width(allocation, score="magnitude", restore="none"),
            Session(make_model()),
        )
        assert pruner.needs_calibration == (allocation not in WITHOUT_DATA)
        if allocation == "global":
            # The scores are all it looks at.
            continue
        if pruner.needs_calibration:
            with pytest.raises(CalibrationError):
                session.plan(pruner)
        else:
            assert session.plan(pruner).operations


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"allocation": "global", "score": "obs"}, "obs ranks the channels of one layer"),
        ({"allocation": "global", "score": "contribution"}, "cannot be compared between layers"),
        ({"allocation": "atp", "spread": 0.2}, "spread has no effect with allocation atp"),
        ({"spread": 0.2}, "spread has no effect with allocation uniform"),
        ({"allocation": "alpha", "spread": 1}, "less than 1"),
        ({"allocation": "alpha", "floor": 1}, "less than 1"),
        ({"allocation": "alphas"}, "layer_redundancy"),
    ],
)
def test_options_without_meaning_are_mistakes(options: dict[str, Any], words: str) -> None:
    """Found when the recipe is read."""
    with pytest.raises(ValidationError, match=words):
        WidthOptions.model_validate(options)


def test_stages_after_an_allocation() -> None:
    """Width sees the layers as they are; what takes the same from every layer, or layers, cannot.

    `uniform` takes the same share from every layer.
    """
    session = session_of()
    first = session.plan(width("atp"))
    session.apply(first)
    before = session.view.dimensions()
    for wrong in (
        TorchPruning(TorchPruning.Options(), Target(ratio=0.1)),
        Deepest(Deepest.Options(), Target(layers_removed=1)),
    ):
        with pytest.raises(UnsupportedModelError, match=f"'{wrong.name}' needs layers of one"):
            session.plan(wrong)
    for allocation in ("uniform", "alpha"):
        plan = session.plan(width(allocation, ratio=0.05))
        assert all(a <= b for a, b in zip(plan.after.widths, before.widths, strict=True))
    session.apply(session.plan(width("uniform", ratio=0.05)))
    lost = [1 - a / b for a, b in zip(session.view.dimensions().widths, before.widths, strict=True)]
    # Of the narrowest layer one step of 2 channels is a sixth.
    assert max(lost) - min(lost) < 0.2 and min(lost) > 0


@pytest.mark.usefixtures("reload_here")
def test_a_run_explains_repairs_and_writes_it(tmp_path: Path, tokens: Path) -> None:
    """Plan, repair of the uneven layers, padded checkpoint, report; explain and apply the plan."""
    make_checkpoint(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""version: 1
model: {{id: {tmp_path / "model"}, device: cpu}}
calibration: {{source: {tokens}}}
stages:
  - prune: width
    target: {{ratio: 0.2}}
    allocation: atp
    multiple_of: 4
  - recover: refit
export:
  - checkpoint: {{}}
output: {tmp_path / "out"}
""")
    ran = command("run", str(recipe))
    assert ran.returncode == 0, ran.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (export,) = report["exports"]
    widths = report["after"]["layer_widths"]
    assert len(set(widths)) > 1
    assert export["padding"] == (6 * max(widths) - sum(widths)) * 96
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{export['padding']:,} parameters are zero padding" in page
    (file,) = (tmp_path / "out").glob("plan*.json")
    explained = command("explain", str(file)).stdout
    assert f"MLP channels:   48 -> {min(widths)} to {max(widths)}" in explained
    model, again = str(tmp_path / "model"), str(tmp_path / "again")
    applied = command("apply", str(file), "--model", model, "--output", again)
    assert applied.returncode == 0, applied.stderr


def test_every_layer_is_refitted_though_one_kept_its_width() -> None:
    """One layer is as large as before: a repair must not take the model for an unchanged one."""
    session = Session(make_model(), calibration=random_tokens(12, 16))
    session.keep_reference()
    plan = session.plan(width("atp", ratio=0.15, score="magnitude"))
    wide = plan.before.with_widths((48, *plan.after.widths[1:]))
    assert wide.layer_parameters == plan.before.layer_parameters
    keep = [KeepChannels(layer=i, indices=tuple(range(n))) for i, n in enumerate(wide.widths)]
    session.apply(plan.model_copy(update={"operations": tuple(keep), "after": wide}))
    notes = session.recover(Refit(Refit.Options())).notes
    assert {note.partition(":")[0] for note in notes} >= {f"layer {index}" for index in range(6)}
