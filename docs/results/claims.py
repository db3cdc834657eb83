"""What the results pages say in words, held by their rows.

A sentence of a page that begins in bold has a function here under those words. It is given the rows and the
sentence, and says whether they agree; a sentence without a function, or one that fails, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from front import FEWEST, LINEAR_BESIDE, TWELFTH, TWENTY_FOURTH, WITHOUT
from tables import evaluated

from arkv.study.evaluation import Evaluation
from arkv.study.pairs import Pair, pair

Rows = Mapping[str, Evaluation]
RATIOS = ("1/2", "1/4", "1/6", "1/8")
LINEAR = ("linear", "adakv:of=linear", "pyramid:of=linear")
LAST_LOOK = ("snapkv", "h2o", "tova")
BOLD = re.compile(r"^- \*\*(.+?)\*\*", re.M | re.S)


def keeps(row: Evaluation, full: Evaluation) -> bool:
    """Whether nearly as much is right: 95% of the full cache's share."""
    assert row.accuracy is not None
    assert full.accuracy is not None
    return row.accuracy.share >= 0.95 * full.accuracy.share


def overlap(row: Evaluation, other: Evaluation) -> bool:
    """Whether two intervals do."""
    assert row.accuracy is not None
    assert other.accuracy is not None
    return row.accuracy.high >= other.accuracy.low and other.accuracy.high >= row.accuracy.low


def share(rows: Rows, policy: str, ratio: str) -> float:
    """Right at a ratio."""
    accuracy = rows[at(policy, ratio)].accuracy
    assert accuracy is not None
    return accuracy.share


def at(policy: str, ratio: str) -> str:
    """The name of a row."""
    return f"{policy}{',' if ':' in policy else ':'}ratio={ratio}"


def named(text: str) -> set[str]:
    """The policies that a sentence names."""
    return set(re.findall(r"`([\w:=,]+)`", text))


def little_is_lost_at_half(rows: Rows, text: str) -> bool:
    """Those named as behind are all that is, and those said to keep up at a quarter are all that do."""
    behind, at_a_quarter = (named(part) for part in text.split("are behind"))
    names = {row.name for row in rows.values() if row.asked_ratio}
    found = {name for name in names if not keeps(rows[at(name, "1/2")], rows["full"])}
    quarter = {name for name in names if keeps(rows[at(name, "1/4")], rows["full"])}
    return behind == found and at_a_quarter == quarter


def linear_keeps_up(rows: Rows, text: str) -> bool:
    """Down to an eighth, and with its budgets moved; at a twelfth less than a fifth is left."""
    keep_up = all(overlap(rows[at(name, ratio)], rows["full"]) for name in LINEAR for ratio in RATIOS)
    alike = all(overlap(rows[at("linear", r)], rows[at(name, r)]) for name in LINEAR for r in RATIOS)
    fifth = 0.2 * (rows["full"].accuracy.share if rows["full"].accuracy else 0)
    return keep_up and alike and all(share(rows, name, "1/12") < fifth for name in LINEAR)


def front_keeps_up(rows: Rows, text: str) -> bool:
    """No difference prompt by prompt; at a twelfth SSD has three quarters, others less than a third."""
    differences = [pair(rows["full"], rows[at("front", ratio)]) for ratio in (*RATIOS, "1/12")]
    whole = rows["full"].accuracy.share if rows["full"].accuracy else 1
    others = {row.name for row in rows.values() if row.asked_ratio} - {"front", "ssd", "ssd:buffer=1"}
    return (
        all(each.low < 0 < each.high for each in differences)
        and share(rows, "ssd", "1/12") > 0.75 * whole
        and 0.75 * whole > share(rows, "ssd:buffer=1", "1/12") > 0.5 * whole
        and all(share(rows, name, "1/12") < whole / 3 for name in others)
    )


def last_looks_fall(rows: Rows, text: str) -> bool:
    """Above three quarters of the full cache's at a quarter, below at an eighth."""
    enough = 0.75 * (rows["full"].accuracy.share if rows["full"].accuracy else 1)
    return named(text) == set(LAST_LOOK) and all(
        share(rows, name, "1/4") > enough > share(rows, name, "1/8") for name in LAST_LOOK
    )


def a_window_is_not_enough(rows: Rows, text: str) -> bool:
    """Nearer to the full cache step by step at an eighth, and worse over whole pictures."""
    window = rows[at("window", "1/8")]
    others = [rows[at(name, "1/8")] for name in ("h2o", "tova")]
    assert window.kl is not None
    return all(
        window.kl < (other.kl or 0) and share(rows, "window", "1/8") < share(rows, other.name, "1/8")
        for other in others
    )


def nothing_is_lost_at_one(rows: Rows, text: str) -> bool:
    """How many are right with all tokens, and in which policies another number is."""
    right = {name: row.accuracy.right for name, row in rows.items() if row.accuracy and row.ratio == 1}
    (most,) = re.findall(r"(\d+) of \d+ right", text)
    (fewer,) = re.findall(r"(\d+) are right", text)
    others = {rows[name].name.partition(":")[0]: count for name, count in right.items() if str(count) != most}
    return named(text) == set(others) and set(map(str, others.values())) == {fewer}


def choice(rows: Rows, anchors: int, recent: int, scoring: str, ratio: str = "1/6") -> Evaluation:
    """LineAR with what its paper leaves open."""
    return rows[f"linear:anchors={anchors},recent={recent},scoring={scoring},ratio={ratio}"]


RANKED = {"1/6": (0, 4, 24), "1/8": (0, 4)}
"""Anchors that leave something to rank beside two lines."""


def two_recent_lines(rows: Rows, text: str) -> bool:
    """With two all choices keep up that rank; with one none keeps four fifths."""
    every = [(anchors, scoring) for anchors in (0, 4, 24) for scoring in ("softmax", "raw")]
    enough = 0.8 * (rows["full"].accuracy.share if rows["full"].accuracy else 0)
    return all(
        keeps(choice(rows, a, 48, s, ratio), rows["full"])
        for ratio, ranked in RANKED.items()
        for a, s in every
        if a in ranked
    ) and all(
        accuracy.share < enough
        for ratio in RANKED
        for a, s in every
        if (accuracy := choice(rows, a, 24, s, ratio).accuracy)
    )


def anchors_do_not_tell(rows: Rows, text: str) -> bool:
    """No pair of them differs, where two lines are kept."""
    differences = [
        pair(choice(rows, 0, 48, scoring, ratio), choice(rows, anchors, 48, scoring, ratio))
        for ratio, ranked in RANKED.items()
        for anchors in ranked
        for scoring in ("softmax", "raw")
    ]
    return all(each.low < 0 < each.high for each in differences)


def a_middle_is_needed(rows: Rows, text: str) -> bool:
    """Where nothing is ranked, less than half is right."""
    half = 0.5 * (rows["full"].accuracy.share if rows["full"].accuracy else 0)
    filled = ((24, 72, "1/6"), (24, 48, "1/8"), (0, 72, "1/8"))
    found = [choice(rows, a, r, s, ratio).accuracy for a, r, ratio in filled for s in ("softmax", "raw")]
    return all(each is not None and each.share < half for each in found)


def scores_do_not_tell(rows: Rows, text: str) -> bool:
    """The two scores differ where one line is kept, and not where there are two."""

    def raw_less_softmax(anchors: int, recent: int) -> Pair:
        return pair(choice(rows, anchors, recent, "softmax"), choice(rows, anchors, recent, "raw"))

    one = [raw_less_softmax(anchors, 24) for anchors in (0, 4)]
    two = [raw_less_softmax(anchors, 48) for anchors in (0, 4, 24)]
    return all(each.low > 0 for each in one) and all(each.low < 0 < each.high for each in two)


def a_twenty_fourth_is_enough(rows: Rows, text: str) -> bool:
    """95% of the full cache's pictures at the least, and no difference prompt by prompt, in fewer bytes."""
    front, full = rows[f"{TWENTY_FOURTH}@int4"], rows["full"]
    two = pair(full, front)
    return keeps(front, full) and two.low < 0 < two.high and (front.share_of_bytes or 1) < 1 / 24


def fewer_are_enough(rows: Rows, text: str) -> bool:
    """95% at the least, and no difference prompt by prompt, in a twenty-eighth of the bytes."""
    front, full = rows[f"{FEWEST}@int4"], rows["full"]
    two = pair(full, front)
    return keeps(front, full) and two.low < 0 < two.high and (front.share_of_bytes or 1) < 1 / 28


def linear_falls(rows: Rows, text: str) -> bool:
    """At a twelfth the two cannot be told apart; at a twenty-fourth less than a third is left of LineAR's."""
    beside = {front: rows[f"{linear}@int4"] for front, linear in LINEAR_BESIDE.items()}
    twelfth, less = (pair(beside[front], rows[f"{front}@int4"]) for front in (TWELFTH, TWENTY_FOURTH))
    fallen = beside[TWENTY_FOURTH].accuracy
    full = rows["full"].accuracy
    assert fallen is not None
    assert full is not None
    return twelfth.low < 0 < twelfth.high and less.low > 0 and fallen.share < full.share / 3


def windows_and_looks_are_what_it_is(rows: Rows, text: str) -> bool:
    """Without the ones or the others less than a quarter of the pictures is right."""
    parts = (WITHOUT["windows"], WITHOUT["what the last line looked at"])
    whole, *without = (rows[f"{each}@int4"].accuracy for each in (TWENTY_FOURTH, *parts))
    assert whole is not None
    return all(each is not None and each.share < whole.share / 4 for each in without)


def four_bits_cost_nothing(rows: Rows, text: str) -> bool:
    """The same slots in eight and in sixteen bits are not better, prompt by prompt."""
    wider = [rows[TWENTY_FOURTH], rows[f"{TWENTY_FOURTH}@int8"]]
    return all(pair(rows[f"{TWENTY_FOURTH}@int4"], row).low < 0 for row in wider)


CLAIMS: dict[str, Callable[[Rows, str], bool]] = {
    "At half of the tokens most keep 95% of what the full cache gets right.": little_is_lost_at_half,
    "LineAR, and the budgets built on its scores, keep the full cache's accuracy": linear_keeps_up,
    "`front` keeps it down to a twelfth.": front_keeps_up,
    "What looks at the last line only, or at everything that ever was, keeps up at a quarter and falls at an "
    "eighth": last_looks_fall,
    "A window is not enough.": a_window_is_not_enough,
    "At ratio 1 nothing is lost, and every policy draws the full cache's pictures": nothing_is_lost_at_one,
    "The full cache's accuracy takes less than a twenty-fourth of its bytes.": a_twenty_fourth_is_enough,
    "Thirty-two tokens a head are enough.": fewer_are_enough,
    "LineAR keeps up at a twelfth, and falls at a twenty-fourth.": linear_falls,
    "It is the windows, and what the last line looked at.": windows_and_looks_are_what_it_is,
    "Four bits cost nothing that shows.": four_bits_cost_nothing,
    "Two recent lines are enough, and one is not.": two_recent_lines,
    "How many anchors there are does not tell.": anchors_do_not_tell,
    "There has to be a middle.": a_middle_is_needed,
    "Attention or raw scores do not tell where two lines are kept.": scores_do_not_tell,
}
SAID = {"scenes.md": "scenes", "front.md": "front", "linear.md": "linear"}
"""The pages that say something, and the files of their rows."""


def wrong_claims(page: str, name: str) -> list[str]:
    """What a page says and its rows do not, under "What it says"."""
    said = page.partition("\n## What it says\n")[2].partition("\n## ")[0]
    told = []
    for item in re.split(r"\n(?=- )", said.strip()):
        bold = BOLD.match(item)
        lead = "" if bold is None else " ".join(bold[1].split())
        if lead not in CLAIMS:
            told.append(f"nothing holds {' '.join(item.split())[:80]!r}")
        elif not CLAIMS[lead](evaluated(name), " ".join(item.split())):
            told.append(f"the rows do not say {lead!r}")
    return told
