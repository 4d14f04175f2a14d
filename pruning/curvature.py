"""How much an error in each output of each layer moves what the network is for.

Errors of a layer's readers, however well they are made relative, say nothing of what happens to
them on the way to the network's end. To first order an error δz in some outputs moves the end f by
J δz, and with errors that are independent of each other

    E‖δf‖² ≈ Σ_r E[J_r²] E[δz_r²]

The moment ``curvature`` is E[J_r²] (see `gradients.probe`); in units of what f itself varies by,
it makes errors of different layers comparable.

Letters: r an output of a layer, z_r before its activation, J_r = ∂f/∂z_r, f what counts.
"""

from pruning.calibration import Statistics
from pruning.elimination import OutputWeights
from pruning.network import Network
from pruning.solving import input_gram


def curvature_weights(network: Network, statistics: Statistics) -> OutputWeights:
    """s_r = E[J_r²] / Σ over the network's end of E[J_r²] Var(z_r), for `elimination_paths`.

    With them (and ``balance="none"``) an error of 1 is as much as losing all that the outputs
    which nothing reads have to say.

    Args:
        network: the dense network.
        statistics: of it, with the moments "gram" and "curvature".

    Raises:
        StatisticsError: a moment was not collected, or on another network.

    Source: Molchanov et al. 2019 and Singh and Alistarh 2020 (WoodFisher), for the Fisher matrix
    in the place of the Hessian; diagonal here.
    """
    s = {la.name: statistics.average(la.name, "curvature") for la in network.graph.layers}
    whole = 0.0
    for layer in network.graph.layers:
        if not any(network.graph.readers(layer.name)):
            gram = input_gram(network, layer, statistics)
            W = network.weights[layer.name].double()
            covariance = gram[:-1, :-1] - gram[:-1, -1:] @ gram[-1:, :-1]
            variance = ((W @ covariance) * W).sum(dim=1).clamp(min=0)
            whole += float((s[layer.name].to(variance) * variance).sum())
    return {name: of_layer / whole if whole > 0 else of_layer for name, of_layer in s.items()}
