"""Selection of transmission paths from impact scores.

A path takes one key and one value in every layer (2L nodes); its score φ is the sum of its
nodes' scores (Zhai et al. 2025, section 4.2.5). Because the sum has no cross terms, the best
path takes the best node everywhere.
"""

import heapq
from dataclasses import dataclass

import torch
from torch import Tensor

from kmebench.editors.needs import Selection
from kmebench.errors import ConfigError
from kmebench.precision import exact


@dataclass(frozen=True)
class Paths:
    """Critical paths T+ and insignificant paths τ− of G groups of requests.

    ``positive`` [G, L, 2, N] and ``negative`` [G, L, 2, K] are int64 segment indices; entry n
    belongs to the n-th path. ``positive_scores`` has the shape of ``positive``. All lie where the
    scores do.
    """

    positive: Tensor
    negative: Tensor
    positive_scores: Tensor


def select_paths(
    scores: Tensor, n_paths: int, n_negative: int, selection: Selection = "disjoint"
) -> Paths:
    """Select the N best and the K worst paths for every group from scores [G, L, 2, M].

    ``disjoint``: path n takes the n-th ranked node of every layer and matrix, so paths share
    nothing. ``kbest``: the N highest-scoring paths of the whole product space, exactly; they
    share most of their nodes. Negative paths are always disjoint, lowest ranked first.
    Ties go to the lower index.

    Raises:
        ConfigError: more disjoint paths are asked for than the FFN has segments.
    """
    if n_paths + n_negative > scores.shape[-1]:
        raise ConfigError(
            f"paths={n_paths} and negatives={n_negative} ask for more segments than the "
            f"{scores.shape[-1]} of one FFN matrix; lower them."
        )
    ranked = scores.sort(dim=-1, descending=True, stable=True)
    negative = scores.sort(dim=-1, stable=True).indices[..., :n_negative]
    if selection == "disjoint":
        ranks = torch.arange(n_paths, device=scores.device).expand(*scores.shape[:-1], n_paths)
    else:
        ranks = torch.stack([k_best_ranks(group, n_paths) for group in ranked.values])
        ranks = ranks.to(scores.device)
    positive = ranked.indices.gather(-1, ranks)
    return Paths(positive, negative, ranked.values.gather(-1, ranks))


def k_best_ranks(ranked: Tensor, n_paths: int) -> Tensor:
    """Return, for the N best paths, the rank they take in every list: [L, 2, N].

    ``ranked`` [L, 2, M] is sorted in descending order along its last axis.
    """
    lists = exact(ranked.reshape(-1, ranked.shape[-1])[:, :n_paths])  # ranks past N never win
    drops = (lists[:, :1] - lists).tolist()  # loss against the best node, ascending
    chosen = _k_smallest_sums(drops, n_paths)
    ranks = torch.zeros(len(drops), n_paths, dtype=torch.long)
    for path, deviations in enumerate(chosen):
        for position, rank in deviations.items():
            ranks[position, path] = rank
    return ranks.reshape(*ranked.shape[:-1], n_paths)


def _k_smallest_sums(lists: list[list[float]], count: int) -> list[dict[int, int]]:
    """Choose one entry from each ascending list, with the ``count`` smallest sums, in order.

    Returns the deviations {list: entry} from taking every first entry. Lists are ordered by
    their first gap; then each combination has one parent of no larger sum, and a heap visits
    every combination at most once (lazy enumeration, O(count log count)).
    """
    order = sorted(range(len(lists)), key=lambda i: lists[i][1] if len(lists[i]) > 1 else 0.0)
    order = [i for i in order if len(lists[i]) > 1]
    found: list[dict[int, int]] = [{}]
    heap: list[tuple[float, int, int, dict[int, int]]] = []
    ticket = 0  # first come, first served among equal sums; never compares dicts

    def push(total: float, place: int, deviations: dict[int, int]) -> None:
        nonlocal ticket
        ticket += 1
        heapq.heappush(heap, (total, ticket, place, deviations))

    if order:
        push(lists[order[0]][1], 0, {order[0]: 1})
    while heap and len(found) < count:
        total, _, place, deviations = heapq.heappop(heap)
        found.append(deviations)
        current = order[place]
        rank = deviations[current]
        if rank + 1 < len(lists[current]):
            step = lists[current][rank + 1] - lists[current][rank]
            push(total + step, place, deviations | {current: rank + 1})
        if place + 1 < len(order):
            following = order[place + 1]
            push(total + lists[following][1], place + 1, deviations | {following: 1})
            if rank == 1:
                moved = {k: v for k, v in deviations.items() if k != current} | {following: 1}
                push(total - lists[current][1] + lists[following][1], place + 1, moved)
    return found
