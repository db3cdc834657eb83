"""Checkpoints on the Hugging Face hub, through its own client and cache; a path is taken as it is.

Nothing is asked of the hub at import. The client's variables hold: `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`,
`HF_HUB_OFFLINE` and the others.
"""

from __future__ import annotations

import re
import socket
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from arkv.errors import CheckpointError
from arkv.patience import within
from arkv.weights.files import check_folder, exists, is_folder, place

PATIENCE = 4.0
"""Seconds in which the hub has to take a connection: its client waits minutes where nobody answers."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(source: str | Path) -> bool:
    """Whether a text has the form of a repository's name and is no path that exists."""
    return isinstance(source, str) and bool(HUB_ID.fullmatch(source)) and not exists(Path(source))


def fetch(
    source: str | Path,
    first: Sequence[str],
    *others: Sequence[str],
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """The file or folder at a path, or a folder of the hub's cache with the files that are needed.

    Args:
        source: a path, or the name of a repository such as "deepseek-ai/Janus-Pro-1B".
        first: patterns of the names of the files that are needed.
        others: what will do instead if the repository has nothing for one of these patterns.
        revision: branch, tag or commit; None for the main branch.
        token: for repositories that ask who reads them; None for the one that the client knows.

    Raises:
        CheckpointError: there is no such path, and the repository or one of the files cannot be had.
    """
    path = place(source)
    if exists(path):
        if is_folder(path):
            check_folder(path)
        return path
    if not is_hub_id(source):
        raise CheckpointError(f"there is no file or folder {str(source)[:200]!r}")
    from huggingface_hub import snapshot_download

    folder, unreachable = Path(), _unreachable()
    for patterns in (first, *others):
        try:
            downloaded = snapshot_download(
                str(source),
                revision=revision,
                token=token,
                allow_patterns=list(patterns),
                local_files_only=unreachable is not None,
            )
        except Exception as error:  # of the client, of its transport, of the disk
            raise CheckpointError(
                f"there is no folder {str(source)!r}, and it cannot be had from the hub: "
                f"{unreachable or _reason(error)}"
            ) from error
        folder = Path(downloaded)
        if all(any(folder.glob(pattern)) for pattern in patterns):
            break
    return folder


def _unreachable() -> str | None:
    """Why the hub cannot be asked, and what to do; None if it can, or if its client is not to ask."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return None
    parts = urlsplit(constants.ENDPOINT)
    proxies, host = urllib.request.getproxies(), parts.hostname or ""
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(host):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = parts.port or (443 if parts.scheme == "https" else 80)

    def connect() -> None:
        socket.create_connection((parts.hostname or "", port), PATIENCE).close()

    try:
        within(PATIENCE, connect)  # which has no time limit for looking up a name
    except OSError as error:
        told = error.strerror or "no answer"
    else:
        return None
    return (
        f"no connection to {parts.hostname} ({told}), and it was not downloaded before; connect, or "
        "download it elsewhere and name the folder that it is in"
    )


def _reason(error: Exception) -> str:
    """What an exception of the hub's client says, in one line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text[:300]}..." if len(text) > 300 else text
