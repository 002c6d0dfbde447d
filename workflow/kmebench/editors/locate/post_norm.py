"""W2 behind a norm: what it has to say so that the residual stream moves as wanted.

Gemma 2 and 3 normalise the FFN's output before it joins the residual stream, h = r + N(m) with m
what W2 says, N(m) = g ⊙ m / rms(m). So W2's output is no part of the stream, and what N can add is
bounded: at each rms of m it is one ellipsoid. A change ρ of the stream asks for

    m' = argmin ‖N(m') − (N(m) + ρ)‖   subject to   ‖m'‖ = ‖m‖,

since N forgets the length. With a_i what N makes of a constant vector of m's rms, and v = m' / rms,
this is the point of {a ⊙ v : ‖v‖² = D} closest to y = N(m) + ρ. There v_i = a_i y_i / (a_i² + μ);
the multiplier μ > −min a² gives v its length, which falls as μ grows. Where N reaches y, μ = 0.
"""

import torch
from torch import Tensor, nn

from kmebench.precision import exact

#: Halvings of the interval around μ: more than a float64 has bits.
HALVINGS = 100


@torch.no_grad()
def value_change(norm: nn.Module, outputs: Tensor, change: Tensor) -> Tensor:
    """Return the change [B, D] of W2's outputs m that brings N(m) + ρ about, as far as N can.

    ``outputs`` [B, D] is m, ``change`` [B, D] is ρ. In float64.
    """
    m = exact(outputs)
    rms = m.square().mean(dim=1, keepdim=True).sqrt()
    gains = exact(norm(rms.to(outputs).expand_as(outputs)))
    wanted = exact(norm(outputs)) + exact(change)
    return rms * _closest(gains, wanted) - m


def _closest(gains: Tensor, wanted: Tensor) -> Tensor:
    """Return v [B, D] with ‖v‖² = D for which gains ⊙ v is closest to ``wanted``."""
    size = wanted.shape[1] ** 0.5
    numerator, squares = gains * wanted, gains.square()
    low = -squares.min(dim=1, keepdim=True).values
    high = numerator.norm(dim=1, keepdim=True) / size
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_long = (numerator / (squares + middle)).norm(dim=1, keepdim=True) > size
        low, high = torch.where(too_long, middle, low), torch.where(too_long, high, middle)
    return numerator / (squares + high)
