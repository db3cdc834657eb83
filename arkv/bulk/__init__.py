"""Many pictures on one GPU, all GPUs of a machine, or a cluster; a run that is killed goes on where it was.

`run` draws what a `Description` says, the contents of a `job.yaml`. The folder's index says which files are
done, and a file is on the disk before its line is. What is drawn is cut into units, such as a batch or a
shard; an engine decides who draws which, and that is all that engines differ in.
"""

from arkv.bulk.description import Description, read_description
from arkv.bulk.run import Summary, run
from arkv.bulk.status import Status, status

__all__ = ["Description", "Status", "Summary", "read_description", "run", "status"]
