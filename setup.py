"""What pyproject.toml cannot say: README.md on a package index, without what only the repository has."""

import re
from pathlib import Path

from setuptools import setup

REPOSITORY = r"<!-- repository -->.*?<!-- /repository -->\n"
COMMENT = r"<!--.*?-->\n"
RELATIVE_LINK = r"\[([^\]]+)\]\((?!https?:)[^)]*\)"


def description() -> str:
    """README.md without its pictures, which have no absolute address; of a relative link its words stay."""
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    text = re.sub(COMMENT, "", re.sub(REPOSITORY, "", text, flags=re.DOTALL))
    return re.sub(RELATIVE_LINK, r"\1", text)


if __name__ == "__main__":
    setup(long_description=description(), long_description_content_type="text/markdown")
