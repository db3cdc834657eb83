"""What pyproject.toml cannot say: README.md as a package index shows it, and the commit of a build."""

import os
import re
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
REPOSITORY = r"<!-- repository -->.*?<!-- /repository -->\n"
COMMENT = r"<!--.*?-->\n"
RELATIVE_LINK = r"\[([^\]]+)\]\((?!https?:)[^)]*\)"


def description() -> str:
    """README.md without its pictures, which have no absolute address; of a relative link its words stay."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    text = re.sub(COMMENT, "", re.sub(REPOSITORY, "", text, flags=re.DOTALL))
    return re.sub(RELATIVE_LINK, r"\1", text)


def commit() -> str:
    """What is built; empty where nobody knows. Where there is no checkout, ARKV_COMMIT may say."""
    if given := os.environ.get("ARKV_COMMIT"):
        return given
    if not (HERE / ".git").exists():  # a copy may lie inside somebody else's repository
        return ""
    describe = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


class BuildWithCommit(build_py):
    """As ever, and a note for results to name; what is installed for editing asks its checkout."""

    def run(self) -> None:
        """Build."""
        super().run()
        if not self.editable_mode and (built_from := commit()):
            Path(self.build_lib, "arkv", "_commit.txt").write_text(built_from)


if __name__ == "__main__":
    setup(
        cmdclass={"build_py": BuildWithCommit},
        long_description=description(),
        long_description_content_type="text/markdown",
    )
