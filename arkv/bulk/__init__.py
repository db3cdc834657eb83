"""Many pictures on one GPU, all GPUs of a machine, or a cluster; a run that is killed goes on where it was.

`run` draws what a `Description` says, the contents of a `job.yaml`. The folder's index says which files are
done, and a file is on the disk before its line is. What is drawn is cut into units, such as a batch or a
shard; an engine decides who draws which, and that is all that engines differ in.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arkv.bulk.description import Description as Description
    from arkv.bulk.description import read_description as read_description
    from arkv.bulk.progress import Status as Status
    from arkv.bulk.progress import status as status
    from arkv.bulk.runner import Summary as Summary
    from arkv.bulk.runner import run as run

# Resolved on first use: a worker watches over its driver before it waits for torch.
_HOMES = {
    "Description": "description",
    "Status": "progress",
    "Summary": "runner",
    "read_description": "description",
    "run": "runner",
    "status": "progress",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'arkv.bulk' has no attribute {name!r}")
    return getattr(import_module(f"arkv.bulk.{_HOMES[name]}"), name)
