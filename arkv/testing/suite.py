"""`PolicySuite`: what every cache policy has to pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from arkv.estimate import check_memory
from arkv.grid import Grid
from arkv.model import ModelSpec
from arkv.policy import CachePolicy
from arkv.testing.cases import (
    CORNERS,
    SIZES,
    Case,
    batches,
    cases,
    corner,
    extremes,
    fuzzed,
    is_legal,
    is_whole,
    least_size,
    size_parameters,
    sized,
)
from arkv.testing.checks import (
    addresses_stay,
    changes_nothing,
    decoding_repeats,
    looking_leaves_no_trace,
    poison_is_survived,
    rows_are_independent,
    slots_have_no_order,
    survives_json,
    verbs_trace,
    windows_leave_no_trace,
)
from arkv.testing.invariants import (
    EVERY_INVARIANT,
    Invariant,
    attention_is_exact,
    budgets_hold,
    check,
    every_head_sees,
    evictions_are_legal,
    newborns_live,
    tokens_are_themselves,
)
from arkv.testing.tiny import Tiny, random_tokens

Check = Callable[[Case], None]

# Of a profile's examples a check tries one in so many: nearly every example decodes some pictures, a trace
# compiles four functions, and fuzzed parameters are mostly refused before anything is decoded.
DECODED = 8
TRACED = 60
FUZZED = 4


class PolicySuite:
    """Conformance tests of a cache policy, for pytest.

    Inherit, and name the policy:

        class TestMine(PolicySuite):
            policy = MyPolicy
            parameters = {"anchors": 2}

    Every test decodes pictures with tiny random models under random budgets. The active profile of
    hypothesis says how many: most checks take an eighth of its `max_examples`.

    Class attributes:
        policy: the class to test. If it takes a `budget` or a `ratio`, the suite gives it.
        parameters: the others, as a dict or as a hypothesis strategy of dicts, so small that a grid of five
            by five tokens leaves something to choose; defaults are made for real grids.
    """

    policy: ClassVar[type[CachePolicy]]
    parameters: ClassVar[Mapping[str, Any] | st.SearchStrategy[dict[str, Any]]] = {}

    def parameters_for(self, spec: ModelSpec) -> st.SearchStrategy[dict[str, Any]]:
        """What to build the policy with for a model of this shape; override where it depends on the model."""
        given = self.parameters
        return st.just(dict(given)) if isinstance(given, Mapping) else given

    def test_1_no_head_holds_more_than_its_budget(self) -> None:
        """After an eviction a head holds its budget at most (heads that share: all together theirs)."""
        self._hold(budgets_hold)

    def test_2_condition_tokens_stay_and_no_token_stands_twice(self) -> None:
        """Condition tokens are resident to the end; no token is in a head twice, or again once given up."""
        self._hold(tokens_are_themselves)

    def test_3_attention_is_over_exactly_what_is_visible(self) -> None:
        """Logits, mass, scores and queries are those of a naive model over the same tokens."""
        self._hold(every_head_sees, attention_is_exact)

    def test_4_a_token_lives_until_the_eviction_after_its_birth(self) -> None:
        """No token disappears between evictions."""
        self._hold(newborns_live)

    def test_5_a_budget_for_the_whole_picture_changes_nothing(self) -> None:
        """At ratio 1 the logits are those of a causal pass without any cache."""
        spec = Tiny().spec
        if not any(field.name in SIZES for field in fields(self._policy)) and not is_whole(
            self._policy(), spec
        ):
            pytest.skip(
                f"{self._policy.__name__} takes neither budget nor ratio, so it never keeps everything"
            )
        self._for_cases(changes_nothing, whole=True)

    def test_6_the_order_of_the_slots_makes_no_difference(self) -> None:
        """A head whose tokens lie in other slots keeps the same ones and gives the same logits."""
        self._for_cases(slots_have_no_order)

    def test_6_rows_do_not_know_of_each_other(self) -> None:
        """A picture is the same alone, with less padding, as it is in a batch."""
        self._for_cases(rows_are_independent)

    def test_7_a_window_leaves_no_trace(self) -> None:
        """Several tokens a pass are those of one a pass, and the policy remembers the same."""
        self._for_cases(windows_leave_no_trace)

    def test_7_the_verbs_are_one_graph_each(self) -> None:
        """With `fullgraph=True`, `select`, `evict`, `observe` and `visible` do what they do eagerly."""
        self._for_cases(verbs_trace, share=TRACED, model=Tiny())

    def test_7_the_store_stays_in_place(self) -> None:
        """No tensor of the store is moved, replaced or added while pictures are decoded."""
        self._for_cases(addresses_stay)

    def test_selections_are_legal(self) -> None:
        """`select` names distinct slots that its head may give up, free ones first; `evict` frees them."""
        self._hold(evictions_are_legal)

    def test_select_and_visible_only_look(self) -> None:
        """`select` and `visible` write nothing to the store."""
        self._for_cases(looking_leaves_no_trace)

    def test_a_picture_is_the_same_every_time(self) -> None:
        """Decoding again gives the same bits, in a new store and in one that has held another picture."""
        self._for_cases(decoding_repeats)

    def test_statistics_may_be_any_number(self) -> None:
        """`select` stays legal if statistics are NaN, infinite or all equal."""
        self._for_cases(poison_is_survived)

    @pytest.mark.parametrize("name", CORNERS)
    def test_corners(self, name: str) -> None:
        """Every invariant holds where pictures are tiny, at the smallest budget and at the largest."""
        grid, (heads, kv_heads) = CORNERS[name]
        model = Tiny(grid, heads=heads, kv_heads=kv_heads)

        def smallest_and_largest(parameters: dict[str, Any]) -> None:
            least = least_size(self._policy, parameters, model.spec)
            assume(least is not None)
            for size in sorted({least or 0, grid.tokens}):
                check(corner(self._policy, parameters, model, size), *EVERY_INVARIANT)

        self._run(smallest_and_largest, self.parameters_for(model.spec), TRACED)

    def test_ratio_and_budget_agree(self) -> None:
        """A ratio of `k / N` is a budget of `k`."""
        spec = Tiny().spec
        tokens = spec.grid.tokens

        def agree(parameters: dict[str, Any]) -> None:
            if size_parameters(self._policy, parameters) != list(SIZES):
                return
            for size in range(1, tokens + 1):
                if is_legal(self._policy, parameters, size, spec):
                    by_budget = self._policy(**parameters, budget=size)  # type: ignore[call-arg]
                    by_ratio = self._policy(**parameters, ratio=f"{size}/{tokens}")  # type: ignore[call-arg]
                    plans = by_budget.plan(spec.grid, spec), by_ratio.plan(spec.grid, spec)
                    assert plans[0] == plans[1], f"budget {size}, ratio {size}/{tokens}: {plans}"

        self._run(agree, self.parameters_for(spec), DECODED)

    def test_any_parameters_end_in_an_error_or_in_a_legal_run(self) -> None:
        """What annotations allow raises a `ValueError` before decoding begins, or keeps every invariant."""
        model = Tiny(layers=2, heads=2, kv_heads=2)

        def fuzz(data: st.DataObject) -> None:
            parameters = data.draw(self.parameters_for(model.spec)) | data.draw(fuzzed(self._policy))
            # Fuzzed sizes are mostly illegal, and would hide what the other parameters do.
            if data.draw(st.sampled_from((True, True, True, False))):
                parameters = {name: value for name, value in parameters.items() if name not in SIZES}
            share = data.draw(st.sampled_from((0.0, 0.3, 0.7, 1.0)))
            self._survives(model, parameters, share, lambda policy: data.draw(batches(model, policy)))

        self._run(fuzz, st.data(), FUZZED)

    def test_extreme_parameters_end_in_an_error_or_in_a_legal_run(self) -> None:
        """Zero, negative, huge, NaN, nonsense, in one parameter after the other: as above."""
        model = Tiny(Grid(3, 2), layers=1, heads=2, kv_heads=2)

        def one_by_one(parameters: dict[str, Any]) -> None:
            for name, value in extremes(self._policy):
                for share in (0.0, 1.0):
                    self._survives(
                        model,
                        parameters | {name: value},
                        share,
                        lambda policy: Case(model, policy, [(1, 2)], random_tokens(model, 1), guided=True),
                    )

        self._run(one_by_one, self.parameters_for(model.spec), TRACED)

    def test_it_is_written_down_and_read_back(self) -> None:
        """`from_dict` makes of `to_dict`, by way of JSON, an equal policy; parameters cannot be changed."""
        self._for_cases(survives_json)

    @property
    def _policy(self) -> type[CachePolicy]:
        policy = getattr(self, "policy", None)
        if not (isinstance(policy, type) and issubclass(policy, CachePolicy) and is_dataclass(policy)):
            pytest.fail(f"{type(self).__name__}.policy is {policy!r}: expected a dataclass, a CachePolicy")
        return policy

    def _hold(self, *invariants: Invariant) -> None:
        def hold(case: Case) -> None:
            check(case, *invariants)

        self._for_cases(hold)

    def _for_cases(
        self,
        test: Check,
        whole: bool = False,
        share: int = DECODED,
        model: Tiny | None = None,
    ) -> None:
        self._run(test, cases(self._policy, self.parameters_for, whole, model), share)

    def _run(
        self, test: Callable[..., None], drawn: st.SearchStrategy[Any], share: int, *arguments: Any
    ) -> None:
        """Try a test on what a strategy draws, on a share of the profile's examples."""
        active = settings()
        quick = settings(
            max_examples=max(1, active.max_examples // share),
            deadline=None,
            # What is tried once or twice takes long, and is not random in what matters.
            phases=set(active.phases)
            - ({Phase.shrink, Phase.explain} if share == TRACED else {Phase.explain}),
            suppress_health_check={
                *active.suppress_health_check,
                HealthCheck.too_slow,
                HealthCheck.data_too_large,
            },
        )

        # Made anew for every policy: hypothesis wants a test to belong to one class.
        @quick
        @given(drawn)
        @torch.inference_mode()
        def example(value: Any) -> None:
            test(value, *arguments)

        example()

    def _survives(
        self,
        model: Tiny,
        parameters: dict[str, Any],
        share: float,
        batch_of: Callable[[CachePolicy], Case],
    ) -> None:
        """Build a policy, `share` of the way from its least size to all tokens; decode if it can be built."""
        spec, tokens = model.spec, model.spec.grid.tokens
        try:
            least = least_size(self._policy, parameters, spec)
            size = tokens if least is None else least + round(share * (tokens - least))
            policy = sized(self._policy, parameters, size, tokens)
            assert policy.plan(spec.grid, spec).budgets(spec)
            case = batch_of(policy)
            check_memory(model, policy, len(case.prompts), case.guided, spec.max_condition)
        except ValueError:
            return
        try:
            check(case, *EVERY_INVARIANT)
        except Exception as error:
            raise AssertionError(f"{policy} was accepted and fails: {error}") from error
