"""The record of one analysis: every figure with the protocol it was taken by."""

from __future__ import annotations

from typing import Literal

from slm_plugin.calibration.samples import CalibrationRecord
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.fingerprint import Fingerprint
from slm_plugin.record import Record

Matrix = tuple[tuple[float, ...], ...]


class NoiseCka(Record):
    """CKA of independent Gaussian sets in the shape of a layer's output: nothing in common.

    Attributes:
        biased: Mean over all pairs of sets.
        unbiased: Mean over all pairs of sets.
        scatter: Standard deviation of the unbiased one over the pairs.
    """

    biased: float
    unbiased: float
    scatter: float


class LayerCka(Record):
    """CKA of the outputs of every two layers, over samples whose tokens are laid end to end.

    Attributes:
        biased: By the usual estimator, ``(layers, layers)``.
        unbiased: By the unbiased estimator, ``(layers, layers)``.
        biased_by_chance: Mean of the biased one over all pairings of one layer's samples with
            the other's, ``(layers, layers)``. That of the unbiased one is 0.
        directions: Effective number of directions in which the samples of a layer differ, from 1
            to samples - 1, one number a layer; near 1 a single outlier decides the layer's CKA.
    """

    biased: Matrix
    unbiased: Matrix
    biased_by_chance: Matrix
    directions: tuple[float, ...]


class Outlier(Record):
    """The token in which the samples of a layer differ most.

    Attributes:
        sample: Its sample, from 0.
        position: Its place in the sample, from 0.
        share: Its part of all squared deviations from the mean sample, at most 1 - 1/samples.
    """

    sample: int
    position: int
    share: float


class LayerCosine(Record):
    """Cosine of the outputs of every two layers along the hidden axis, averaged over tokens.

    Attributes:
        same_token: Of the same token in both layers, ``(layers, layers)``.
        other_token: Of different tokens of the set, averaged over all pairs of them,
            ``(layers, layers)``.
    """

    same_token: Matrix
    other_token: Matrix


class TokenNorms(Record):
    """Euclidean norms over all tokens."""

    mean: float
    median: float


class LayerNorms(Record):
    """Norms per layer: of its output and of what it and its two blocks add to the stream."""

    output: tuple[TokenNorms, ...]
    update: tuple[TokenNorms, ...]
    attention: tuple[TokenNorms, ...]
    mlp: tuple[TokenNorms, ...]


class Figures(Record):
    """Everything that is measured.

    Attributes:
        cka: CKA of the layers' outputs as they are.
        cka_unit_tokens: The same with every token's vector at unit length.
        outliers: The token that weighs most in ``cka``, one a layer.
        noise: CKA of sets that have nothing in common.
        cosine: Cosines between the layers' outputs.
        block_influence: One minus the mean cosine of input and output, one number a layer.
        norms: Lengths of the vectors.
    """

    cka: LayerCka
    cka_unit_tokens: LayerCka
    outliers: tuple[Outlier, ...]
    noise: NoiseCka
    cosine: LayerCosine
    block_influence: tuple[float, ...]
    norms: LayerNorms


class Analysis(Record):
    """One analysis with its protocol; written as ``analysis.json``."""

    format: Literal[1] = 1
    created: str
    model: str
    seed: int
    calibration: CalibrationRecord
    fingerprint: Fingerprint
    dimensions: Dimensions
    figures: Figures
    versions: dict[str, str]
    machine: str
    seconds: float
