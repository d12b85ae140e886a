"""The data of list, inspect and doctor: components, a model's dimensions, installed packages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from slm_plugin.control_characters import visible
from slm_plugin.extras import found_version, missing
from slm_plugin.models.families.family import Family
from slm_plugin.models.families.suitability import why_not
from slm_plugin.models.view import DecoderView, layer_kinds
from slm_plugin.registry import evaluators, exporters, pruners, recoveries
from slm_plugin.registry.installed import broken_metadata
from slm_plugin.versions import bounds, extra_rows, installed_versions, wanted


def components(
    family: Family | None = None, config: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Every pruner, recovery, evaluator and exporter, with its options and extra.

    A plugin that cannot be used has a row with the reason.

    Args:
        family: For a model, what is true of its class; every row then has ``unsuited``, the reason
            why the component cannot be used with it, empty where it can.
        config: Content of that model's ``config.json``.
    """
    found = []
    for registry in (pruners, recoveries, evaluators, exporters):
        faults = registry.faults()
        unusable = {fault.name for fault in faults if not fault.usable}
        for name in registry.names():
            if name not in unusable:
                cls = registry.get(name)
                row = _component(registry.kind, name, cls)
                if family is not None:
                    row["unsuited"] = why_not(cls, family, config or {})
                found.append(row)
        for fault in faults:
            row = {"kind": fault.kind, "name": fault.name, "summary": fault.message}
            found.append({**row, "targets": [], "extra": None, "options": [], "ready": False})
    return found


def suitability_table(name: str, found: list[dict[str, Any]]) -> Table:
    """Which components work on a model, a line each."""
    table = Table(title=f"What works on {visible(name)}")
    for column in ("kind", "name", "works"):
        table.add_column(column, overflow="fold")
    for row in found:
        reason = row.get("unsuited", row["summary"])
        needs = "" if row["ready"] or not row["extra"] else f", needs slm-plugin[{row['extra']}]"
        table.add_row(
            row["kind"], visible(row["name"]), visible(f"no: {reason}" if reason else f"yes{needs}")
        )
    return table


def _component(kind: str, name: str, cls: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": name,
        # With -OO no class has a docstring.
        "summary": next(iter((cls.__doc__ or "").strip().splitlines()), ""),
        "targets": list(getattr(cls, "targets", ())),
        "extra": cls.extra,
        "ready": cls.extra is None or not missing(cls.extra),
        "options": [
            {
                "name": option,
                "default": None if field.is_required() else repr(field.default),
                "description": field.description or "",
            }
            for option, field in cls.Options.model_fields.items()
        ],
    }


def component_table(found: list[dict[str, Any]]) -> Table:
    """Components as a table, one option per line."""
    table = Table(title="Components", show_lines=True)
    for column in ("kind", "name", "what it does", "options (default)"):
        table.add_column(column, overflow="fold")
    for row in found:
        needs = "" if row["ready"] or not row["extra"] else f"\nneeds slm-plugin[{row['extra']}]"
        targets = f"\ntarget: {', '.join(row['targets'])}" if row.get("targets") else ""
        options = "\n".join(
            visible(
                f"{o['name']} ({'required' if o['default'] is None else o['default']}): "
                f"{o['description']}"
            )
            for o in row["options"]
        )
        summary = visible(row["summary"])
        table.add_row(row["kind"], visible(row["name"]), summary + targets + needs, options)
    return table


def inspection(view: DecoderView) -> dict[str, Any]:
    """A model's dimensions, its parameters by part, and the units that can be pruned."""
    dims, config = view.dimensions(), view.config.to_dict()
    blocks = (view.family.attention, view.family.mlp)
    attention, mlp = (_matrices(view, block) for block in blocks)
    parts = {"attention": attention * dims.layers, "mlp": mlp * dims.layers}
    if view.family.by_tensors:
        # What an encoder has outside of its layers differs from class to class.
        outside = dims.parameters - dims.layers * dims.layer_parameters
        parts["outside of the layers"] = outside
        parts["norms and other parts of layers"] = dims.parameters - sum(parts.values())
    else:
        head = 0 if dims.tied_embeddings else sum(p.numel() for p in view.head.parameters())
        parts = {"embedding": view.embedding.weight.numel(), "head": head, **parts}
        if view.family.tower is not None:
            decoder = sum(p.numel() for p in view.decoder.parameters())
            parts["vision"] = dims.parameters - decoder - head
        parts["norms"] = dims.parameters - sum(parts.values())
    # Without others in its group it goes with its key/value head alone.
    lone_head = dims.query_head_parameters if dims.queries_per_group > 1 else 0
    return {
        "dimensions": dims.model_dump(),
        "parameters": parts,
        "units": {
            "layer": {"count": dims.layers, "parameters": dims.layer_parameters},
            **{
                f"{unit} in every layer": {"count": count, "parameters": size * dims.layers}
                for unit, count, size in (
                    ("mlp_channel", dims.intermediate_size, dims.channel_parameters),
                    ("kv_group", dims.kv_heads, dims.kv_group_parameters),
                    ("query_head", dims.attention_heads, lone_head),
                    ("expert", dims.experts, dims.expert_parameters),
                )
                if size
            },
            **(
                {"hidden_channel": {"count": dims.hidden_size, "parameters": hidden}}
                if (hidden := dims.hidden_parameters)
                else {}
            ),
        },
        "family": {
            "model_type": view.family.model_type,
            "residual": view.family.residual_of(config),
            "fixed_layers": dims.fixed_layers,
            "kinds": dict(Counter(_named(kind) for kind in layer_kinds(view))),
            "not_removable": {
                unit: view.family.reason(unit)
                for unit in ("channels", "kv_groups")
                if unit not in view.family.units
            }
            | ({"hidden": reason} if (reason := view.family.no_hidden_channels) else {}),
        },
    }


def _matrices(view: DecoderView, block: Sequence[str]) -> int:
    """Parameters of a block of the first layer, without norms."""
    own = {*block} - {*view.family.stream_norms}
    return sum(
        parameter.numel()
        for name, parameter in view.layers[0].named_parameters()
        if name.partition(".")[0] in own and "norm" not in name.lower()
    )


def _named(kind: tuple[object, ...]) -> str:
    attention, *others = kind
    extra = "" if all(one in (None, 1) for one in others) else " without positions"
    return f"{attention or 'full_attention'}{extra}"


def inspection_table(name: str, found: dict[str, Any]) -> Table:
    """An inspection as one table."""
    total = found["dimensions"]["parameters"]
    table = Table(
        title=f"{visible(name)}: {found['dimensions']['architecture']}, {total:,} parameters"
    )
    for column, right in (("what", False), ("count", True), ("parameters", True), ("share", True)):
        table.add_column(column, justify="right" if right else "left")
    for part, scalars in found["parameters"].items():
        table.add_row(part, "", f"{scalars:,}", f"{scalars / total:.2%}")
    table.add_section()
    for unit, row in found["units"].items():
        scalars = row["parameters"]
        table.add_row(f"one {unit}", str(row["count"]), f"{scalars:,}", f"{scalars / total:.3%}")
    table.add_section()
    for field in ("hidden_size", "attention_heads", "kv_heads", "head_dim", "vocab_size"):
        table.add_row(field, str(found["dimensions"][field]), "", "")
    if found["dimensions"]["stack"]:
        table.add_row("stack", visible(found["dimensions"]["stack"]), "", "")
    table.add_row("tied embeddings", str(found["dimensions"]["tied_embeddings"]), "", "")
    table.add_section()
    family = found["family"]
    table.add_row("residual connections", visible(family["residual"]), "", "")
    if family["fixed_layers"]:
        table.add_row("lowest layers that must stay", str(family["fixed_layers"]), "", "")
    for kind, count in family["kinds"].items():
        table.add_row(f"layers with {visible(kind)}", str(count), "", "")
    return table


def doctor_report() -> dict[str, Any]:
    """Installed and required versions; ``problems`` lists mismatches and faulty plugins."""
    problems = broken_metadata()
    for registry in (pruners, recoveries, evaluators, exporters):
        problems += [fault.message for fault in registry.faults()]
    for requirement in wanted():
        found = found_version(requirement.name)
        needed = requirement.marker is None or "extra" not in str(requirement.marker)
        if found is None:
            if needed:
                problems.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name} {found} is not {requirement.specifier}")
    core = [
        {"package": r.name, "found": found_version(r.name) or "", "wanted": bounds(r.name)}
        for r in wanted()
        if r.marker is None or "extra" not in str(r.marker)
    ]
    return {
        "versions": installed_versions(),
        "core": core,
        "extras": extra_rows(),
        "problems": sorted(set(problems)),
    }


def doctor_table(found: dict[str, Any]) -> Table:
    """The doctor's report as one table."""
    table = Table(title="Installed packages", caption="\n".join(found["problems"]) or "all is well")
    for column in ("package", "found", "wanted", "extra", "for"):
        table.add_column(column)
    for row in found["core"]:
        table.add_row(row["package"], row["found"] or "missing", row["wanted"], "", "core")
    table.add_section()
    for row in found["extras"]:
        install = row["found"] or f"pip install 'slm-plugin[{row['extra']}]'"
        table.add_row(row["package"], install, row["wanted"], row["extra"], row["for"])
    return table
