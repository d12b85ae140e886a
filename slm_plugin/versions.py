"""Which packages are installed here, and what this machine is: for reports and `doctor`."""

from __future__ import annotations

import platform
from importlib.metadata import requires

from packaging.requirements import Requirement

from slm_plugin.extras import EXTRAS, found_version

DISTRIBUTION = "slm-plugin"
REPORTED = (
    DISTRIBUTION,
    "torch",
    "transformers",
    "tokenizers",
    "torch-pruning",
    "optimum",
    "optimum-onnx",
    "onnx",
    "onnxruntime",
    "lm-eval",
    "peft",
    "numpy",
)


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result."""
    found = {"python": platform.python_version()}
    found.update({name: v for name in REPORTED if (v := found_version(name)) is not None})
    return found


def machine() -> str:
    """The machine in a line: system, processor and CPU cores that torch uses."""
    import torch

    cards = torch.cuda.device_count()
    gpu = f", {cards} x {torch.cuda.get_device_name(0)}" if cards else ""
    return f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads{gpu}"


def wanted() -> list[Requirement]:
    """What this package requires, its extras included (`Requirement.marker` names the extra)."""
    return [Requirement(line) for line in requires(DISTRIBUTION) or ()]


def bounds(distribution: str) -> str:
    """The version range that this package accepts of another, as ``>=4.57,<6``."""
    ranges = [str(r.specifier) for r in wanted() if r.name.lower() == distribution.lower()]
    return next((r for r in ranges if r), "any")


def extra_rows() -> list[dict[str, str]]:
    """One row per distribution of every extra: found, wanted, what it is for."""
    rows = []
    for extra in EXTRAS.values():
        for distribution in extra.distributions:
            rows.append(
                {
                    "package": distribution,
                    "found": found_version(distribution) or "",
                    "wanted": bounds(distribution),
                    "extra": extra.name,
                    "for": extra.purpose,
                }
            )
    return rows
