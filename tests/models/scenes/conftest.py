"""What the tests of the scenes share: pictures, and a codebook fitted to them."""

import numpy
import pytest
from numpy.typing import NDArray

from arkv.models.scenes.codebook import Codebook
from arkv.models.scenes.drawing import sample_picture
from arkv.models.scenes.grammar import GROUPS, Prompt

Samples = list[tuple[Prompt, NDArray[numpy.uint8]]]


@pytest.fixture(scope="session")
def codebook() -> Codebook:
    """A codebook from few pictures: some 2 dB worse than the model's, and ready in seconds."""
    rng = numpy.random.default_rng(0)
    pictures = [sample_picture(GROUPS[index % len(GROUPS)], rng)[1] for index in range(60)]
    return Codebook.fit(numpy.stack(pictures))


@pytest.fixture(scope="session")
def samples() -> Samples:
    """Two thousand prompts of all groups, none used in training, and a picture of each."""
    rng = numpy.random.default_rng(1)
    return [sample_picture(GROUPS[index % len(GROUPS)], rng, held_out=True) for index in range(2000)]


@pytest.fixture(scope="session")
def decoded(samples: Samples, codebook: Codebook) -> Samples:
    """The same with the pictures as the codebook gives them back."""
    pictures = codebook.decode(codebook.encode(numpy.stack([picture for _, picture in samples])))
    return [(prompt, picture) for (prompt, _), picture in zip(samples, pictures, strict=True)]
