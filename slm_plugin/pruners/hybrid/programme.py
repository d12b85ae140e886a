"""The integer programme that chooses a width for every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slm_plugin.errors import NumericalError
from slm_plugin.lazy import np
from slm_plugin.pruners.hybrid.allotment import Allotment

# Divergences are counted in millionths of a nat: HiGHS stops within a millionth of its unit.
_PER_NAT = 1e6
# Of plans whose divergences differ by less than this a layer, in that unit, lower layers lose more.
_TIE = 1e-3


def cheapest(
    increases: Sequence[Mapping[int, float]], allotment: Allotment
) -> tuple[int, ...] | None:
    """The width of every layer, 0 for a removed one, by the least sum of increases.

    With x = 1 for the one width that a layer takes and 0 for its others,

    ::

        minimise sum of increase * x
        where each layer has one x = 1, ``removed`` layers have that of width 0,
        and the sum of width * x lies between the least and the most that the allotment gives

    Args:
        increases: For every layer, the divergence in nats a token by the width that it
            keeps; with width 0 where the layer may be removed.
        allotment: How many layers are removed, and the channels of the others.

    Returns:
        The widths, as many as layers; None where none meet the allotment.

    Raises:
        NumericalError: The solver fails.

    Source: the programme of NVIDIA's Puzzletron, whose costs are the increases of single
        replacements; here by HiGHS, to the optimum.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    whole = max(map(max, increases))
    options = [(layer, width) for layer, of in enumerate(increases) for width in sorted(of)]
    places, widths = (np.array(one) for one in zip(*options, strict=True))
    costs = np.array([increases[layer][width] for layer, width in options])
    ties = _TIE / len(increases) * places * (1 - widths / whole)
    numbers = np.arange(len(options))
    one_each = csr_array((np.ones(len(options)), (places, numbers)))
    # Whole numbers half a channel inside the bounds, so that rounding decides nothing.
    bounds = (allotment.least - 0.5) / whole, (allotment.most + 0.5) / whole
    found = milp(
        _PER_NAT * costs + ties,
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint((widths == 0)[None] * 1.0, allotment.removed, allotment.removed),
            LinearConstraint(widths[None] / whole, *bounds),
        ],
        options={"mip_rel_gap": 0},
    )
    if found.status == 2:
        return None
    if found.status != 0:
        raise NumericalError(f"the integer programme has no solution: {found.message}")
    chosen = [option for option, taken in zip(options, found.x, strict=True) if taken > 0.5]
    return tuple(width for _, width in chosen)
