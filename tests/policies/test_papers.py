"""Every policy against its paper's algorithm over plain lists, over whole pictures.

The boxes are written from the papers and import nothing of the policies. Queries and keys have sinks, bands
and tokens that look alike (see `structured`). Where a policy says that it departs from its paper ("ours"),
the box departs as well, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import pytest
from profiles import profile_of, saved
from structured import WORDS, Box, Head, Structured, compare

from arkv import CachePolicy, Grid, load_policy
from arkv.head_profile import HeadProfile
from arkv.testing.oracle import Place

GRID = Grid(8, 8)
LINE = 8
BUDGET = 24
SEEDS = (0, 1)


def best(tokens: Iterable[int], score: dict[int, float], count: int) -> list[int]:
    """The `count` tokens of the greatest score, oldest first."""
    return sorted(sorted(tokens, key=lambda j: (score[j], j), reverse=True)[: max(0, count)])


class Streaming(Box):
    """2309.17453: four sinks and a window of the newest."""

    def evict(self, t: int) -> None:
        for head in self.heads.values():
            if len(head.held) > BUDGET:
                head.held = head.held[:4] + head.held[-(BUDGET - 4) :]


class H2O(Box):
    """2306.14048: s_j += a_t[j]; half of the budget for the newest, half for the greatest sums."""

    def __init__(self, heads: dict[Place, Head], grid: Grid) -> None:
        super().__init__(heads, grid)
        self.sums: dict[Place, dict[int, float]] = {place: {} for place in heads}

    def look(self, t: int) -> None:
        for place, head in self.heads.items():
            for j, a in head.attention(t, head.held).items():
                self.sums[place][j] = self.sums[place].get(j, 0) + a

    def evict(self, t: int) -> None:
        for place, head in self.heads.items():
            if len(head.held) > BUDGET:
                old, recent = head.held[: -BUDGET // 2], head.held[-BUDGET // 2 :]
                head.held = best(old, self.sums[place], BUDGET // 2) + recent


class TOVA(Box):
    """2401.06104: the newest query alone decides, nothing is protected; here every head for itself (ours)."""

    def look(self, t: int) -> None:
        self.seen = {place: head.attention(t, head.held) for place, head in self.heads.items()}

    def evict(self, t: int) -> None:
        for place, head in self.heads.items():
            if len(head.held) > BUDGET:
                head.held = best(head.held, self.seen[place], BUDGET)


class TOVAOfLayers(TOVA):
    """The same with the mean over the heads of a layer, as the paper has it."""

    def look(self, t: int) -> None:
        super().look(t)
        mean: dict[Place, dict[int, float]] = {}
        for layer, row, h in self.heads:
            together = [self.seen[other] for other in self.heads if other[:2] == (layer, row)]
            mean[layer, row, h] = {j: sum(a[j] for a in together) / len(together) for j in together[0]}
        self.seen = mean


class Votes(Box):
    """What the queries of a line paid to the tokens held, by place; a fresh list for every line."""

    period = LINE
    raw = False

    def __init__(self, heads: dict[Place, Head], grid: Grid) -> None:
        super().__init__(heads, grid)
        self.line: dict[Place, list[dict[int, float]]] = {place: [] for place in heads}

    def look(self, t: int) -> None:
        for place, head in self.heads.items():
            seen = head.scores(t, head.held) if self.raw else head.attention(t, head.held)
            self.line[place].append(seen)

    def forget(self) -> None:
        for looks in self.line.values():
            looks.clear()


class SnapKV(Votes):
    """2404.14469 at every line's end (ours), the line being the observation window.

    Of neighbours in the picture that are no longer held, or in the window, there are no votes (ours).
    """

    def score(self, place: Place) -> dict[int, float]:
        held, looks = self.heads[place].held, self.line[place]
        votes = {j: sum(look.get(j, 0) for look in looks) / len(looks) for j in held[:-LINE]}
        return {j: sum(votes.get(i, 0) for i in range(j - 2, j + 3)) / 5 for j in votes}

    def budget(self, layer: int) -> int:
        return BUDGET

    def evict(self, t: int) -> None:
        for place, head in self.heads.items():
            budget = self.budget(place[0])
            if len(head.held) > budget:
                head.held = best(head.held[:-LINE], self.score(place), budget - LINE) + head.held[-LINE:]
        self.forget()


class Pyramid(SnapKV):
    """2406.02069 over three layers: b = 16, min = b / 20 = 0.8, max = 2 b - min = 31.2, in between 16."""

    def budget(self, layer: int) -> int:
        return LINE + (31, 16, 1)[layer]  # 31.2, 47.2 and 48 in sum, rounded


class AdaKV(SnapKV):
    """2407.11550 with the safeguard alpha 0.2."""

    def evict(self, t: int) -> None:
        for layer, row in dict.fromkeys(place[:2] for place in self.heads):
            places = [place for place in self.heads if place[:2] == (layer, row)]
            if sum(len(self.heads[place].held) for place in places) <= BUDGET * len(places):
                continue
            free = BUDGET - LINE
            every = [(s, place, j) for place in places for j, s in self.score(place).items()]
            winners = [place for _, place, _ in sorted(every, reverse=True)[: len(places) * free]]
            for place in places:
                head = self.heads[place]
                own = round(0.8 * winners.count(place) + 0.2 * free)
                head.held = best(head.held[:-LINE], self.score(place), own) + head.held[-LINE:]
        self.forget()


class RKV(Votes):
    """2505.24133, section 3; the window of 8 is a line. Attention is pooled after the mean (as published)."""

    published = False

    def score(self, place: Place) -> dict[int, float]:
        head = self.heads[place]
        old = head.held[:-LINE]
        shares = [{j: a[j] / sum(a[i] for i in old) for j in old} for a in self.line[place]]
        mean = [sum(a[j] for a in shares) / len(shares) for j in old]
        importance = [max(mean[max(0, i - 3) : i + 4]) for i in range(len(old))]
        n = len(head.held)
        similar = [[0.0] * n for _ in range(n)]
        for i in range(n):
            for j in range(n):
                if i != j:
                    similar[i][j] = cosine(head.key[head.held[i]], head.key[head.held[j]])
            repeats = [j for j in range(n) if similar[i][j] > 0.5]
            if repeats:
                similar[i][repeats[-1]] = 0.0
            elif self.published:
                similar[i][0] = 0.0
        weights = [math.exp(sum(similar[i][j] for i in range(n)) / n) for j in range(n)]
        return {j: 0.1 * importance[i] - 0.9 * weights[i] / sum(weights) for i, j in enumerate(old)}

    def evict(self, t: int) -> None:
        for place, head in self.heads.items():
            if len(head.held) > BUDGET:
                score, old = self.score(place), head.held[:-LINE]
                kept = best(old, score, BUDGET - LINE)
                if self.published:
                    kept.sort(key=lambda j: -score[j])
                head.held = kept + head.held[-LINE:]
        self.forget()


class PublishedRKV(RKV):
    """The published code: kept tokens stay in the order of their scores; slot 0 stands for no neighbour."""

    published = True


def cosine(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)


class LineAR(Votes):
    """2512.04857: anchors, a recent line, and the middle by what the last line looked at."""

    def evict(self, t: int) -> None:
        for place, head in self.heads.items():
            safe = [j for j in head.held if j < 4 or j >= t - LINE]
            middle = [j for j in head.held if j not in safe]
            score = {j: sum(look.get(j, 0) for look in self.line[place]) for j in middle}
            head.held = sorted(safe + best(middle, score, BUDGET - len(safe)))
        self.forget()


class RawLineAR(LineAR):
    """The same by scaled dot products."""

    raw = True


class Diagonal(Box):
    """2609.19702, as its pseudo-code has it: N_r 24 resident, N_att 12 attended to."""

    def __init__(self, heads: dict[Place, Head], grid: Grid) -> None:
        super().__init__(heads, grid)
        self.skip: dict[Place, set[int]] = {place: set() for place in heads}

    def evict(self, t: int) -> None:
        for place, head in self.heads.items():
            head.held = head.held[-BUDGET:]
            # The token that is dropped when t comes is still in its slot, unseen.
            self.skip[place] = {j + 1 for j in self.skip[place]} | {t - BUDGET}

    def attended(self, place: Place) -> list[int]:
        return [j for j in self.heads[place].held if j not in self.skip[place]]

    def look(self, t: int) -> None:
        for place, head in self.heads.items():
            skip = self.skip[place]
            if 12 - 1 <= t < BUDGET and len([j for j in skip if j >= 0]) < BUDGET - 12:
                seen = head.attention(t, self.attended(place))
                skip.add(min(self.attended(place), key=lambda j: (seen[j], j)))


class HeadKV(Votes):
    """2605.20600: heads grouped at three lines, w 16, tau 0.9, r_s 0.5; raw scores of the last line."""

    raw = True
    window = 2 * LINE

    def evict(self, t: int) -> None:
        for place, head in self.heads.items():
            if t == 3 * LINE:
                head.local = self.is_local(head, t - 1)
            if t < 3 * LINE:
                continue
            history, recent = head.held[: -self.window], head.held[-self.window :]
            head.held = (self.stratified(place, history) if not head.local else []) + recent
        self.forget()

    def is_local(self, head: Head, t: int) -> bool:
        attention, found, count = head.attention(t, head.held), 0.0, 0
        for j in [*reversed(head.held), *range(-1, -1 - WORDS, -1)]:
            if found >= 0.9:
                break
            found, count = found + attention[j], count + 1
        return count < self.window

    def stratified(self, place: Place, history: list[int]) -> list[int]:
        excess = len(history) - (BUDGET - self.window)
        if excess <= 0:
            return history
        score = {j: sum(look.get(j, 0) for look in self.line[place]) / LINE for j in history}
        half = len(history) // 2
        far, near = history[:half], history[half:]
        return best(far, score, len(far) - excess // 2) + best(
            near, score, len(near) - (excess - excess // 2)
        )


BOXES: dict[str, tuple[type[Box], CachePolicy]] = {
    "streaming": (Streaming, load_policy("streaming", budget=BUDGET, period=1)),
    "h2o": (H2O, load_policy("h2o", budget=BUDGET, period=1)),
    "tova": (TOVA, load_policy("tova", budget=BUDGET, period=1)),
    "tova by layers": (TOVAOfLayers, load_policy("tova", budget=BUDGET, period=1, mean_heads=True)),
    "snapkv": (SnapKV, load_policy("snapkv", budget=BUDGET)),
    "pyramid": (Pyramid, load_policy("pyramid", budget=BUDGET)),
    "adakv": (AdaKV, load_policy("adakv", budget=BUDGET)),
    "rkv": (RKV, load_policy("rkv", budget=BUDGET)),
    "rkv as published": (PublishedRKV, load_policy("rkv", budget=BUDGET, as_published=True)),
    "linear": (LineAR, load_policy("linear", budget=BUDGET, recent=LINE)),
    "linear, raw": (RawLineAR, load_policy("linear", budget=BUDGET, recent=LINE, scoring="raw")),
    "diagonal": (Diagonal, load_policy("diagonal", budget=BUDGET, attended=12, period=1)),
    "headkv": (
        HeadKV,
        load_policy("headkv", budget=BUDGET, window=2 * LINE, warmup=3 * LINE, local_share=0.0),
    ),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("box", "policy"), BOXES.values(), ids=BOXES)
def test_what_is_held_and_seen_is_what_the_paper_says(box: type[Box], policy: CachePolicy, seed: int) -> None:
    model = Structured(GRID, layers=3 if box is Pyramid else 2, seed=seed)
    heads = math.prod(model.keys.shape[:3])
    assert compare(model, policy, box) == heads * (GRID.tokens - 1)


class Algorithm1(Box):
    """SSD, 2510.18716, algorithm 1: one semantic head and one spatial head a layer, W 26, M 53."""

    window, memory = 26, 53

    def __init__(self, heads: dict[Place, Head], grid: Grid) -> None:
        super().__init__(heads, grid)
        self.sums: dict[Place, dict[int, float]] = {place: {} for place in heads}

    def semantic(self, place: Place) -> bool:
        return place[2] == 0

    def evict(self, t: int) -> None:
        for place, head in self.heads.items():
            if not self.semantic(place):
                head.held = head.held[-self.window :]  # K_<t [-W:], before t is appended

    def look(self, t: int) -> None:
        for place, head in self.heads.items():
            if not self.semantic(place):
                continue
            cached = head.held[:-1]  # K_<t
            for j, a in head.attention(t, cached).items():
                self.sums[place][j] = self.sums[place].get(j, 0) + a
            head.held = [*best(cached, self.sums[place], self.memory), t]


class BufferedSSD(Algorithm1):
    """With a buffer of a line, and 12 newest tokens that semantic heads keep beside M = 42."""

    period = 24

    def look(self, t: int) -> None:
        for place, head in self.heads.items():
            for j, a in head.attention(t, head.held[:-1]).items():
                self.sums[place][j] = self.sums[place].get(j, 0) + a

    def evict(self, t: int) -> None:
        for place, head in self.heads.items():
            if not self.semantic(place):
                head.held = head.held[-self.window :]
            elif len(head.held) > 42 + 12:
                head.held = best(head.held[:-12], self.sums[place], 42) + head.held[-12:]


class WithinSSD(BufferedSSD):
    """The same with the buffer inside of what a head may hold."""

    def evict(self, t: int) -> None:
        for place, head in self.heads.items():
            if not self.semantic(place):
                head.held = head.held[-(self.window - 24) :]
            elif len(head.held) > 42 + 12 - 24:
                head.held = best(head.held[:-12], self.sums[place], 42 - 24) + head.held[-12:]


@pytest.mark.parametrize(
    ("box", "parameters"),
    [
        (Algorithm1, {"recent": 1, "buffer": 1}),
        (BufferedSSD, {"recent": 12}),
        (WithinSSD, {"recent": 12, "buffer_within": True}),
    ],
)
def test_ssd_holds_what_its_listing_says(box: type[Box], parameters: dict, tmp_path: Path) -> None:
    # Its own pictures' size: with a budget of 40, two of four heads semantic, they get 54 and the others 26.
    model = Structured(Grid(24, 24), rows=1)
    profile = saved(profile_of(model.spec, [[0.5, 0.1]] * 2), tmp_path / "heads.json")
    policy = load_policy("ssd", budget=40, window=26, profile=profile, **parameters)
    assert compare(model, policy, box) == 4 * 575


class Front(Votes):
    """Ours: heads 0 keep the newest 70, as many as they need; heads 1 get the other 26 of 2 x 48.

    Of those are the 19 newest, and the tokens that the last line looked at most.
    """

    period = 24

    def evict(self, t: int) -> None:
        for place, head in self.heads.items():
            if place[2] == 0:
                head.held = head.held[-70:]
            elif len(head.held) > 26:
                old, newest = head.held[:-19], head.held[-19:]
                score = {j: sum(look.get(j, 0) for look in self.line[place]) for j in old}
                head.held = best(old, score, 26 - 19) + newest
        self.forget()


def test_front_holds_what_its_box_says(tmp_path: Path) -> None:
    model = Structured(Grid(24, 24), rows=1)
    reach = (((100,) + (70,) * 98, (300,) * 99),) * 2
    profile = saved(HeadProfile("structured", 576, reach, 1, 1.0, "2026-01-01", {}), tmp_path / "heads.json")
    policy = load_policy("front", budget=48, profile=profile, recent=19)
    assert compare(model, policy, Front) == 4 * 575
