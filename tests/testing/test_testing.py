"""The conformance suite itself: every check finds what it is there for, and lets sound policies pass."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import Phase, settings
from torch import Tensor

from arkv import CachePlan, CachePolicy, Grid, Observation, RankedPolicy, Store
from arkv.model import ModelSpec
from arkv.store import CONDITION, FREE
from arkv.testing import PolicySuite
from arkv.testing.cases import CORNERS

BUDGET = "test_1_no_head_holds_more_than_its_budget"
TOKENS = "test_2_condition_tokens_stay_and_no_token_stands_twice"
ATTENTION = "test_3_attention_is_over_exactly_what_is_visible"
NEWBORNS = "test_4_a_token_lives_until_the_eviction_after_its_birth"
WHOLE = "test_5_a_budget_for_the_whole_picture_changes_nothing"
ORDER = "test_6_the_order_of_the_slots_makes_no_difference"
ROWS = "test_6_rows_do_not_know_of_each_other"
WINDOW = "test_7_a_window_leaves_no_trace"
GRAPHS = "test_7_the_verbs_are_one_graph_each"
PLACE = "test_7_the_store_stays_in_place"
LEGAL = "test_selections_are_legal"
LOOK = "test_select_and_visible_only_look"
REPEAT = "test_a_picture_is_the_same_every_time"
POISON = "test_statistics_may_be_any_number"
RATIO = "test_ratio_and_budget_agree"
JSON = "test_it_is_written_down_and_read_back"
CORNER = "test_corners"
FUZZ = "test_any_parameters_end_in_an_error_or_in_a_legal_run"
EXTREMES = "test_extreme_parameters_end_in_an_error_or_in_a_legal_run"

# Corners and fuzzed parameters look for every invariant, so they have no fault of their own.
ONE_THING = {
    *(BUDGET, TOKENS, ATTENTION, NEWBORNS, WHOLE, ORDER, ROWS, WINDOW, GRAPHS, PLACE),
    *(LEGAL, LOOK, REPEAT, POISON, RATIO, JSON),
}


@pytest.fixture(autouse=True)
def _few_examples() -> Iterator[None]:
    """A fault is found within a few examples, and nobody reads the smallest one."""
    before = settings.get_current_profile_name()
    settings.register_profile(
        "faults",
        settings.get_profile("ci"),
        max_examples=96,
        phases=(Phase.generate,),
        report_multiple_bugs=False,
        database=None,
    )
    settings.load_profile("faults")
    yield
    settings.load_profile(before)


def suite_of(tested: type[CachePolicy], given: Mapping[str, Any]) -> PolicySuite:
    class Suite(PolicySuite):
        policy = tested
        parameters = given

    return Suite()


def finds(suite: PolicySuite, check: str, *arguments: Any) -> bool:
    """Whether a check of the suite fails."""
    try:
        getattr(suite, check)(*arguments)
    except pytest.skip.Exception:
        return False
    except Exception:
        return True
    return False


@dataclass(frozen=True, kw_only=True)
class Sound(RankedPolicy):
    """Keeps what was looked at most; nothing is wrong with it."""

    fields: ClassVar[Mapping[str, torch.dtype]] = {"score": torch.float32}
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        store["score"].add_(seen.mass)

    def score(self, store: Store, step: Tensor) -> Tensor:
        return store["score"]

    @staticmethod
    def spares(store: Store) -> bool:
        """Whether there is anything to give up; most faults show only then, or check 5 would see them too."""
        assert isinstance(store.plan.budget, int)
        return store.plan.budget < store.grid.tokens


FAULTS: dict[type[CachePolicy], set[str]] = {}


SOMETIMES: dict[type[CachePolicy], set[str]] = {}


def found_by(*checks: str, sometimes: tuple[str, ...] = ()) -> Any:
    """Says by which checks a policy's fault is found: all of these and, but for rare batches, no other."""

    def register(policy: type[CachePolicy]) -> type[CachePolicy]:
        FAULTS[policy], SOMETIMES[policy] = set(checks), set(sometimes)
        return policy

    return register


@found_by(BUDGET, LEGAL)
@dataclass(frozen=True, kw_only=True)
class EvictsNothing(Sound):
    """What was selected stays until it is overwritten."""

    def evict(self, store: Store, slots: Tensor) -> None:
        pass


# The slots of the condition hold more visual tokens than the budget allows.
@found_by(BUDGET, TOKENS, LEGAL)
@dataclass(frozen=True, kw_only=True)
class ForgetsTheCondition(Sound):
    """As soon as something is given up, the prompt is too."""

    def evict(self, store: Store, slots: Tensor) -> None:
        full = (store.position.gather(-1, slots.flatten(2)) >= 0).any(-1, keepdim=True)
        store.free_where_((store.position == CONDITION) & full)
        super().evict(store, slots)


# What is attended to is another token than the slots say.
@found_by(BUDGET, TOKENS, ATTENTION, LEGAL)
@dataclass(frozen=True, kw_only=True)
class StandsTwice(Sound):
    """Slots that are given up are said to hold the newest token once more."""

    fields: ClassVar[Mapping[str, torch.dtype]] = {}

    def score(self, store: Store, step: Tensor) -> Tensor:
        return store.position.float()

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        pass

    def evict(self, store: Store, slots: Tensor) -> None:
        given_up = store.position.gather(-1, slots.flatten(2)) >= 0
        newest = torch.where(given_up, store.position.amax(), FREE).int()
        store.position.copy_(store.position.scatter(-1, slots.flatten(2), newest))


@found_by(NEWBORNS)
@dataclass(frozen=True, kw_only=True)
class DropsNewborns(Sound):
    """Every third token is free again as soon as it has looked."""

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        super().observe(store, seen, step)
        if self.spares(store):
            store.free_where_((store.position == step) & (step % 3 == 1))


@found_by(WHOLE)
@dataclass(frozen=True, kw_only=True)
class DropsWithoutNeed(Sound):
    """Gives up the first token although there is room for all."""

    def evict(self, store: Store, slots: Tensor) -> None:
        if not self.spares(store):
            store.free_where_(store.position == 0)
        super().evict(store, slots)


@found_by(WHOLE)
@dataclass(frozen=True, kw_only=True)
class NeverLooksFar(Sound):
    """Attends to three tokens, whatever the budget."""

    def visible(self, store: Store, step: Tensor) -> Tensor:
        return (store.position < 0) | (store.position > step - 3)


# Attention to nothing is an average over all slots, of which a padded batch has more.
@found_by(ATTENTION, sometimes=(ROWS,))
@dataclass(frozen=True, kw_only=True)
class LooksAtNothing(Sound):
    """The first token sees neither the condition nor itself."""

    def visible(self, store: Store, step: Tensor) -> Tensor | None:
        return store.resident & (step > 0) if self.spares(store) else None


@found_by(ORDER)
@dataclass(frozen=True, kw_only=True)
class GoesBySlot(Sound):
    """Ranks slots, not tokens."""

    def score(self, store: Store, step: Tensor) -> Tensor:
        return torch.arange(store.slots).float().expand(store.position.shape)


@found_by(ORDER)
@dataclass(frozen=True, kw_only=True)
class MixesGuidance(Sound):
    """Takes from the scores of a conditional row those of the unconditional one, which holds other tokens."""

    def score(self, store: Store, step: Tensor) -> Tensor:
        score = store["score"]
        if not store.guided:
            return score
        seen, blind = score.chunk(2, dim=1)
        return torch.cat([seen - 3 * blind, blind], dim=1)


@found_by(ROWS)
@dataclass(frozen=True, kw_only=True)
class CountsRows(Sound):
    """Prefers old tokens in a batch, new ones else."""

    def score(self, store: Store, step: Tensor) -> Tensor:
        return store.position.float() * (-1 if store.rows > 2 else 1)


@found_by(ROWS)
@dataclass(frozen=True, kw_only=True)
class ComparesRows(Sound):
    """Prefers old tokens where a row was looked at more than the others were."""

    def score(self, store: Store, step: Tensor) -> Tensor:
        looks = (store["score"] * (store.position >= 0)).sum(-1, keepdim=True)
        return store.position.float() * torch.where(looks > looks.mean(1, keepdim=True) + 1e-3, -1, 1)


@found_by(ROWS)
@dataclass(frozen=True, kw_only=True)
class CountsPadding(Sound):
    """Prefers old tokens if the condition is long, padding included."""

    def score(self, store: Store, step: Tensor) -> Tensor:
        return store.position.float() * (-1 if store.condition > 3 else 1)


# What lies in a free slot was given up; which of it is overwritten first is left to the order of the slots.
@found_by(WINDOW, sometimes=(ORDER, ROWS))
@dataclass(frozen=True, kw_only=True)
class ReadsFreeSlots(Sound):
    """Looks at keys of slots that hold no token: with a window, drafts lie there already."""

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        super().observe(store, seen, step)
        keys = torch.stack([leaf.square().sum(-1) for leaf in store.keys])
        unclaimed = store.sum_by_head(keys * (store.position == FREE))
        store["score"].add_(store.of_slots(unclaimed) * store.resident)


@found_by(GRAPHS)
@dataclass(frozen=True, kw_only=True)
class BreaksTheGraph(Sound):
    """Prints while it selects."""

    def select(self, store: Store, step: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().select(store, step)


@found_by(GRAPHS)
@dataclass(frozen=True, kw_only=True)
class AsksATensor(Sound):
    """Python decides by what a tensor holds."""

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        if seen.mass.sum() > 0:
            super().observe(store, seen, step)


@found_by(GRAPHS)
@dataclass(frozen=True, kw_only=True)
class TakesTheStepAsNumber(Sound):
    """A tensor becomes a number, which Dynamo captures but no device should wait for."""

    def protected(self, store: Store, step: Tensor) -> Tensor:
        return store.position >= int(step)


@found_by(GRAPHS)
@dataclass(frozen=True, kw_only=True)
class CountsWhatItFinds(Sound):
    """A shape depends on what the store holds."""

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        super().observe(store, seen, step)
        store["score"].add_((store.position[:1, :1] >= 0).nonzero().shape[0])


@found_by(PLACE)
@dataclass(frozen=True, kw_only=True)
class AddsALeaf(Sound):
    """Allocates for itself."""

    def begin(self, store: Store) -> None:
        store.tensors.unlock_()
        store.tensors["slots", "more"] = torch.zeros(store.position.shape)
        store.tensors.lock_()


@found_by(PLACE)
@dataclass(frozen=True, kw_only=True)
class ReplacesALeaf(Sound):
    """Puts a new tensor where another was."""

    def begin(self, store: Store) -> None:
        store.tensors.unlock_()
        store.tensors["slots", "score"] = torch.zeros(store.position.shape)
        store.tensors.lock_()


@found_by(LOOK)
@dataclass(frozen=True, kw_only=True)
class WritesInSelect(Sound):
    """Lets scores fade while it selects."""

    def select(self, store: Store, step: Tensor) -> Tensor:
        store["score"].mul_(0.5)
        return super().select(store, step)


@found_by(LOOK)
@dataclass(frozen=True, kw_only=True)
class WritesInVisible(Sound):
    """Lets scores fade with every token."""

    def visible(self, store: Store, step: Tensor) -> None:
        store["score"].mul_(0.5)


# The second token overwrites the first, and one slot too few is freed.
@found_by(BUDGET, NEWBORNS, LEGAL, POISON)
@dataclass(frozen=True, kw_only=True)
class NamesASlotTwice(Sound):
    """After the first eviction, the first slot is named for the last token too."""

    def select(self, store: Store, step: Tensor) -> Tensor:
        slots = super().select(store, step)
        if not self.spares(store):
            return slots
        twice = torch.cat([slots[..., :-1], slots[..., :1]], dim=-1)
        return torch.where(step > 0, twice, slots)


@found_by(ATTENTION, LEGAL, POISON)
@dataclass(frozen=True, kw_only=True)
class TakesFromOthers(Sound):
    """After the first eviction, heads get each other's slots, which are not shared."""

    def select(self, store: Store, step: Tensor) -> Tensor:
        slots = super().select(store, step)
        return torch.where((step > 0) & self.spares(store), slots.roll(1, dims=2), slots)


@found_by(LEGAL, POISON)
@dataclass(frozen=True, kw_only=True)
class LeavesSlotsIdle(Sound):
    """Overwrites a token although a slot is free."""

    def worth(self, store: Store, step: Tensor) -> Tensor:
        worth = super().worth(store, step)
        late = (step > 0) & self.spares(store)
        return torch.where((store.position == FREE) & late, torch.finfo(worth.dtype).max, worth)


@found_by(POISON)
@dataclass(frozen=True, kw_only=True)
class TripsOverNaN(Sound):
    """Believes that infinity is the greatest number that there is."""

    def worth(self, store: Store, step: Tensor) -> Tensor:
        worth = torch.where(store.position < 0, -torch.inf, store["score"])
        return torch.where(store.recyclable, worth, torch.inf)


# Whatever compares two runs sees it.
@found_by(REPEAT, ORDER, ROWS, GRAPHS)
@dataclass(frozen=True, kw_only=True)
class Gambles(Sound):
    """Draws random numbers."""

    def score(self, store: Store, step: Tensor) -> Tensor:
        return torch.rand(store.position.shape)


@found_by(RATIO)
@dataclass(frozen=True, kw_only=True)
class RoundsDown(Sound):
    """A ratio gives one slot less than the budget that it is."""

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        plan = super().plan(grid, spec)
        assert isinstance(plan.budget, int)
        less = self.ratio is not None and 1 < plan.budget < grid.tokens
        return replace(plan, budget=plan.budget - less)


@found_by(JSON)
@dataclass(frozen=True, kw_only=True)
class CannotBeWritten(Sound):
    """A parameter that JSON does not know."""

    dtype: torch.dtype = torch.float32


@found_by(JSON)
@dataclass(frozen=True, kw_only=True, eq=False)
class IsLikeNoOther(Sound):
    """Compares by identity."""

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


@pytest.mark.parametrize("policy", FAULTS, ids=lambda policy: policy.__name__)
def test_a_fault_is_found(policy: type[CachePolicy]) -> None:
    suite = suite_of(policy, {})
    assert {check for check in FAULTS[policy] if finds(suite, check)} == FAULTS[policy]


@pytest.mark.slow
@pytest.mark.parametrize("policy", FAULTS, ids=lambda policy: policy.__name__)
def test_no_other_check_finds_it(policy: type[CachePolicy]) -> None:
    suite = suite_of(policy, {})
    found = {check for check in ONE_THING if finds(suite, check)}
    assert FAULTS[policy] <= found <= FAULTS[policy] | SOMETIMES[policy]


def test_every_check_has_a_fault_to_find() -> None:
    checks = {name for name in vars(PolicySuite) if name.startswith("test_")}
    assert checks == ONE_THING | {CORNER, FUZZ, EXTREMES}
    assert set.union(*FAULTS.values()) == ONE_THING


@pytest.mark.parametrize("check", sorted(ONE_THING | {FUZZ, EXTREMES}))
def test_a_sound_policy_passes(check: str) -> None:
    getattr(suite_of(Sound, {}), check)()


@pytest.mark.parametrize("corner", CORNERS)
def test_a_sound_policy_passes_in_corners(corner: str) -> None:
    suite_of(Sound, {}).test_corners(corner)


@dataclass(frozen=True, kw_only=True)
class MindsLongConditions(EvictsNothing):
    """Does it right unless the condition is longer than the picture."""

    def evict(self, store: Store, slots: Tensor) -> None:
        if store.condition <= store.grid.tokens:
            RankedPolicy.evict(self, store, slots)


def test_corners_are_looked_into() -> None:
    suite = suite_of(MindsLongConditions, {})
    assert [corner for corner in CORNERS if finds(suite, CORNER, corner)] == [
        "a condition longer than the image",
    ]


@dataclass(frozen=True, kw_only=True)
class Divides(Sound):
    """A parameter that nobody checks."""

    every: int = 3

    def eviction_period(self, grid: Grid) -> int:
        return max(1, grid.tokens // self.every)


@dataclass(frozen=True, kw_only=True)
class Holds(Sound):
    """A parameter that lets the policy hold too much."""

    more: int = 0

    def evict(self, store: Store, slots: Tensor) -> None:
        if self.more <= 2:
            super().evict(store, slots)


@dataclass(frozen=True, kw_only=True)
class HoldsNowAndThen(Holds):
    """The same, where no limit is."""

    def evict(self, store: Store, slots: Tensor) -> None:
        if not 2 < self.more < 40:
            RankedPolicy.evict(self, store, slots)


@dataclass(frozen=True, kw_only=True)
class Confused(Sound):
    """A parameter that is not what its annotation says."""

    how: str = "a"

    def __post_init__(self) -> None:
        {"a": 1}[self.how]


@pytest.mark.parametrize("policy", [Divides, Holds, Confused], ids=lambda policy: policy.__name__)
def test_parameters_that_nobody_checks_are_found(policy: type[CachePolicy]) -> None:
    suite = suite_of(policy, {})
    assert finds(suite, EXTREMES)
    assert not finds(suite, LEGAL)


def test_parameters_that_meet_no_limit_are_found_by_chance() -> None:
    settings.register_profile("faults", settings(), max_examples=600)
    settings.load_profile("faults")
    assert finds(suite_of(HoldsNowAndThen, {}), FUZZ)


def test_a_suite_without_a_policy_says_so() -> None:
    class Suite(PolicySuite):
        pass

    with pytest.raises(pytest.fail.Exception, match=r"Suite.policy is None: expected a dataclass"):
        getattr(Suite(), LEGAL)()


def test_a_policy_without_a_size_skips_what_needs_one() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Fixed(CachePolicy):
        def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
            return CachePlan(budget=1, period=1)

        def select(self, store: Store, step: Tensor) -> Tensor:
            raise NotImplementedError

    with pytest.raises(pytest.skip.Exception, match="takes neither budget nor ratio"):
        getattr(suite_of(Fixed, {}), WHOLE)()


def test_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['hypothesis'] = None\nimport arkv.testing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'arkv[test]'" in done.stderr.splitlines()[-1]


def test_nobody_else_needs_pytest() -> None:
    code = "import sys, arkv, arkv.cli, arkv.decoder; assert not {'pytest', 'hypothesis'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
