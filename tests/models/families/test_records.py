"""Records of families: registered, installed, documented, and refused when they are wrong."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, OlmoConfig, OlmoForCausalLM

from slm_plugin.api import list_pruners, prune
from slm_plugin.errors import UnsupportedModelError, UserError
from slm_plugin.models import families
from slm_plugin.models.families import family_of, register_family
from slm_plugin.models.families.family import Family
from slm_plugin.models.families.llama import LLAMA
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import DropLayers
from slm_plugin.report.families import families_markdown
from slm_plugin.surgery.layers import apply_layers
from tests.tiny import command, make_model, random_tokens

PAGE = Path(__file__).parents[3] / "docs" / "families.md"
OLMO = Family(architecture="OlmoForCausalLM", model_type="olmo", reads=frozenset({"clip_qkv"}))


@pytest.fixture(autouse=True)
def own_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    built_in = {(family.architecture, family.stack): family for family in families._BUILT_IN}
    monkeypatch.setattr(families, "_known", built_in)
    monkeypatch.setattr(families, "_asked", set())


def test_the_page_shows_what_the_records_say() -> None:
    """`slm-plugin list --families` prints what stands between the marks of docs/families.md."""
    marks = r"<!-- families: begin -->\n(.*)<!-- families: end -->"
    found = re.search(marks, PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    assert found[1] == families_markdown() + "\n"
    assert command("list", "--families").stdout == families_markdown() + "\n"


def test_a_registered_family_is_pruned() -> None:
    """A record of a third party makes its class one of those that can be viewed and cut."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "vocab_size": 32}
    model = OlmoForCausalLM(OlmoConfig(**sizes, num_attention_heads=2)).eval()
    with pytest.raises(UnsupportedModelError, match="OlmoForCausalLM is not supported"):
        DecoderView.of(model)
    register_family(OLMO)
    assert "slm" in list_pruners(model)
    apply_layers(model, [DropLayers(indices=(1,))])
    assert DecoderView.of(model).dimensions().layers == 3


def unlisted(model_class: type = OlmoForCausalLM) -> OlmoForCausalLM:
    """A tiny model of a class without a record."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "vocab_size": 128}
    config = OlmoConfig(**sizes, num_attention_heads=2, pad_token_id=2)
    made: OlmoForCausalLM = model_class(config).eval()
    return made


def test_an_unlisted_class_with_a_plain_stack_loses_layers(
    tmp_path: Path, reload_here: None
) -> None:
    """Only by dropping; the plan says so, and what is saved is read by the stock class."""
    model = unlisted()
    assert list_pruners(model) == [
        "angular",
        "block_influence",
        "deepest",
        "shapley",
        "shortened",
        "sleb",
    ]
    with pytest.raises(UnsupportedModelError, match="its family is not listed"):
        prune(model, None, "slm", layers_removed=1, calibration=random_tokens())
    result = prune(model, None, "block_influence", layers_removed=2, calibration=random_tokens())
    assert any("no listed family" in note for note in result.plan.notes)
    result.save(str(tmp_path / "less"))
    assert OlmoForCausalLM.from_pretrained(tmp_path / "less").config.num_hidden_layers == 3
    with pytest.raises(UnsupportedModelError, match="no listed family"):
        load(ModelSource(id=str(tmp_path / "less")))
    assert family_of("OlmoForCausalLM") not in families.families()


class Crossing(OlmoForCausalLM):
    """Adds the first layer's input to the last one's output."""

    def forward(self, input_ids: torch.Tensor, **settings: Any) -> Any:
        """The logits of both."""
        found = super().forward(input_ids, **settings)
        found.logits = found.logits + self.lm_head(self.model.embed_tokens(input_ids))
        return found


class Counting(OlmoForCausalLM):
    """Scales what it gives by the number of its layers."""

    def __init__(self, config: OlmoConfig) -> None:
        super().__init__(config)
        self.model.norm.register_forward_pre_hook(
            lambda norm, given: (given[0] + len(self.model.layers),)
        )


@pytest.mark.parametrize("model_class", [Crossing, Counting])
def test_an_unlisted_class_that_computes_more_is_refused(model_class: type) -> None:
    """With the families that are known."""
    with pytest.raises(UnsupportedModelError, match="is not supported") as caught:
        prune(
            unlisted(model_class),
            None,
            "block_influence",
            layers_removed=1,
            calibration=random_tokens(),
        )
    assert "LlamaForCausalLM" in str(caught.value.hint)
    assert list_pruners(unlisted(model_class)) == []


def taken(model: Any) -> None:
    """Prune a layer of a model."""
    prune(model, None, "block_influence", layers_removed=1, calibration=random_tokens())


def test_a_class_of_the_same_name_is_checked_anew() -> None:
    """What was found about one class says nothing of another that only shares its name."""
    taken(unlisted(type("OwnForCausalLM", (OlmoForCausalLM,), {})))
    with pytest.raises(UnsupportedModelError, match="OwnForCausalLM is not supported"):
        taken(unlisted(type("OwnForCausalLM", (Crossing,), {})))


def test_a_class_of_its_own_may_have_a_known_config() -> None:
    """Research code derives classes from stock ones and leaves their model type."""
    own = type("OwnForCausalLM", (LlamaForCausalLM,), {})
    model = own(make_model("llama").config).eval()
    assert "block_influence" in list_pruners(model) and "slm" not in list_pruners(model)
    taken(model)
    assert model.config.num_hidden_layers == 5
    taken(make_model("llama"))


@pytest.mark.parametrize("stock", [LlamaForCausalLM, OlmoForCausalLM])
def test_a_namesake_of_a_stock_class_is_refused(stock: type) -> None:
    """Its record would be the stock class's, and so would what loads the result."""
    model: Any = unlisted(stock) if stock is OlmoForCausalLM else make_model("llama")
    model.__class__ = type(stock.__name__, (stock,), {})
    with pytest.raises(UnsupportedModelError, match=rf"not the {stock.__name__} of transf"):
        taken(model)


@pytest.mark.parametrize(
    "error", [OSError("no such table"), AssertionError(), StopIteration(), SystemExit(3)]
)
def test_whatever_an_unlisted_class_raises_is_one_line(error: BaseException) -> None:
    """Its code is nobody's here."""

    def forward(*given: Any, **settings: Any) -> None:
        raise error

    model = unlisted(type("OwnForCausalLM", (OlmoForCausalLM,), {"forward": forward}))
    with pytest.raises(UnsupportedModelError, match=f"run alone: {type(error).__name__}") as caught:
        taken(model)
    assert "\n" not in str(caught.value)


class Remembering(OlmoForCausalLM):
    """Counts how often it was called."""

    calls = 0

    def forward(self, *given: Any, **settings: Any) -> Any:
        """The stock class's logits."""
        self.calls += 1
        return super().forward(*given, **settings)


def test_an_unlisted_class_that_changes_itself_is_refused() -> None:
    """By its own name: while planning, the strategy would be blamed for it."""
    with pytest.raises(UnsupportedModelError, match="its forward pass changes attribute calls"):
        taken(unlisted(Remembering))


def test_an_installed_family_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its entry point, when a class is asked for that no built-in family has."""
    point = EntryPoint("olmo", f"{__name__}:OLMO", families.GROUP)
    monkeypatch.setattr(families, "points", lambda group: [point])
    assert family_of("OlmoForCausalLM") == OLMO


@pytest.mark.parametrize("value", ["no.such:THING", f"{__name__}:PAGE"])
def test_a_faulty_family_is_told_and_left_out(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names it; the built-in ones go on."""
    point = EntryPoint("odd", value, families.GROUP)
    monkeypatch.setattr(families, "points", lambda group: [point])
    assert LLAMA in families.families()
    told = capsys.readouterr().err
    assert told.count("the family plugin 'odd'") == 1 and told.count("\n") == 1


def test_two_records_of_one_class_are_refused() -> None:
    """Neither a second class of a type nor another record of a class."""
    with pytest.raises(UserError, match="registered already"):
        register_family(Family(architecture="OtherForCausalLM", model_type="llama"))
    with pytest.raises(UserError, match="registered already"):
        register_family(Family(architecture="LlamaForCausalLM", model_type="llama", norm="other"))


def test_list_says_what_works_on_a_model(tmp_path: Path) -> None:
    """With the reason for what does not."""
    make_model("gemma2").save_pretrained(tmp_path)
    told = command("list", "--model", str(tmp_path)).stdout
    assert "no: a norm stands behind its MLP" in " ".join(told.split())
    shown = command("inspect", str(tmp_path)).stdout
    assert "sandwich" in shown and "sliding_attention" in shown
