"""Pictures of plans and measurements, as SVG to put into a page; they need the extra `report`."""

from slm_plugin.report.pictures.heatmaps import heatmaps
from slm_plugin.report.pictures.layers import layer_mapping
from slm_plugin.report.pictures.measurements import before_after, losses
from slm_plugin.report.pictures.profiles import influences, profiles
from slm_plugin.report.pictures.units import widths
from slm_plugin.report.pictures.walks import similarities, walk

__all__ = [
    "before_after",
    "heatmaps",
    "influences",
    "layer_mapping",
    "losses",
    "profiles",
    "similarities",
    "walk",
    "widths",
]
