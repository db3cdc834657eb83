import torch

import arkv
from arkv.estimate import estimate

CARDS = (16, 24, 40, 80, 141)  # gigabytes of 10**9 bytes


def print_batches(names: list[str], condition: int, held: float = 0.0, small: tuple[str, ...] = ()) -> None:
    """The most pictures at a time: guided, bfloat16, a twentieth of a card and `held` gigabytes left free.

    Once more for each way to store the weights of the blocks in `small`.
    """
    print(f"{'GB of the card':37}", *(f"{card:6}" for card in CARDS))
    for name, weights in [(name, weights) for name in names for weights in (None, *small)]:
        # Shapes without weights.
        model = arkv.load_model(name, dtype=torch.bfloat16, device="meta", weights=weights)
        label = f"{name} {weights or ''}"
        for text in ("full", "linear:ratio=1/6"):
            policy = arkv.load_policy(text)
            one, two = (estimate(model, policy, n, condition=condition).total for n in (1, 2))
            fixed, picture = 2 * one - two, two - one  # an estimate is linear in the batch
            fits = [max(0, int((card * 0.95e9 - held * 1e9 - fixed) / picture)) for card in CARDS]
            print(f"{label:20} {text:16}", *(f"{pictures:6,}" for pictures in fits))
