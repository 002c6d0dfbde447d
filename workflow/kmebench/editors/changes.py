"""Changes of projections, however their weights are stored."""

from torch import Tensor
from torch.nn.functional import pad

from kmebench.edits.weights import LowRank, WeightDelta
from kmebench.models.layouts import Projection
from kmebench.precision import promoted


def low_rank(projection: Projection, factors: tuple[Tensor, Tensor]) -> WeightDelta:
    """Return factors u [D, r], v [r, M] of Δ [D, M] as a change of a projection's weight.

    Columns of Δ are the projection's segments; what shares its weight stays as it is.
    """
    dtype, device = promoted(projection.weight.dtype), projection.weight.device
    u, v = (factor.to(dtype).to(device) for factor in factors)  # a device may lack float64
    v = pad(v, (projection.offset, 0)) if projection.offset else v
    part = LowRank(u, v) if projection.axis == 1 else LowRank(v.T, u.T)
    return WeightDelta({projection.weight_name: part})
