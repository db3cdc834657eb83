"""Files made in a thread while the next batch is decoded, and lines captured meanwhile.

The tokens are to be those of decoding alone; the time, that of decoding or of the files, whichever is longer.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator

import torch
from PIL import Image
from rows import Rows, parser
from torch import Tensor

import arkv
from arkv.bulk.overlap import on_stream, overlapped


def main() -> int:
    asked = parser(__doc__).parse_args()
    rows, device = Rows(asked.json), asked.device
    pictures, batches = (2, 2) if asked.small else (32, 3)
    model = arkv.load_model("janus-pro-1b", random_weights=True, dtype="bfloat16", device=device)
    mode = "cudagraphs" if device.type == "cuda" else "none"
    prompts = model.example_prompts(pictures, 0)

    def drawn() -> Iterator[Tensor]:
        # A decoder of its own for each: a line is captured while files are made.
        for first in range(batches):
            decoder = arkv.Decoder(model, arkv.load_policy("linear:ratio=1/6"), compile=mode)
            seeds = range(first * pictures, (first + 1) * pictures)
            yield decoder.generate(prompts, seeds=seeds, pixels=False).tokens

    def files(tokens: Tensor) -> tuple[Tensor, int]:
        with torch.inference_mode():
            size = 0
            for picture in model.pixels(tokens.to(device)):
                file = io.BytesIO()
                Image.fromarray(picture.numpy()).save(file, "PNG")
                size += file.tell()
        return tokens, size

    next(drawn())  # compiles
    begun = time.perf_counter()
    alone = list(drawn())
    decoding = time.perf_counter() - begun
    begun = time.perf_counter()
    for tokens in alone:
        files(tokens)
    writing = time.perf_counter() - begun
    begun = time.perf_counter()
    together = list(overlapped(drawn(), on_stream(device, files)))
    both = time.perf_counter() - begun
    same = all(torch.equal(a, b) for a, (b, _) in zip(alone, together, strict=True))
    rows.add(
        kind="overlap",
        name=f"{batches} batches of {pictures}, {mode}",
        decoding=decoding,
        files=writing,
        together=both,
        same_tokens=same,
        good=same,
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
