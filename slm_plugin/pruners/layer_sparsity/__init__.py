"""How much of each layer its weights or states say can go, relative to the other layers.

`width` spreads the channels of a target over the layers by these numbers; `layer_sparsity` drops
the layers of the highest.
"""
