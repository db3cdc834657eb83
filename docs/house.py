"""Prints how the package is laid out at a commit, or at two: rooms, files, lines, imports, the longest files.

python docs/house.py 4c813e1 HEAD
"""

import argparse
import ast
import subprocess
from dataclasses import dataclass, field

import networkx

PLACES = {"arkv": "arkv", "policies": "arkv.policies", "models": "arkv.models"}
KERNELS = "kernels"
"""In the names of files that may be as long as they need to be."""


@dataclass
class House:
    """What a commit holds.

    Attributes:
        lines: of every file.
        imports: pairs of a module and a module that it imports, anywhere in it, types excepted.
    """

    lines: dict[str, int] = field(default_factory=dict)
    imports: set[tuple[str, str]] = field(default_factory=set)

    @property
    def rooms(self) -> set[str]:
        """Folders with modules in them."""
        return {path.rpartition("/")[0] for path in self.lines}

    @property
    def circles(self) -> list[set[str]]:
        """Modules that import each other, directly or by way of others."""
        found = networkx.strongly_connected_components(networkx.DiGraph(self.imports))
        return [modules for modules in found if len(modules) > 1]


def git(*words: str) -> str:
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout


def module_of(path: str) -> str:
    top, _, rest = path.removesuffix(".py").partition("/")
    return f"{PLACES[top]}.{rest.replace('/', '.')}".removesuffix(".__init__")


def imported(tree: ast.AST, known: set[str]) -> set[str]:
    """Modules of the package that a file imports, but for what it imports for its types only."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & known) or {node.module}
        found |= imported(node, known)
    return found & known


def look(commit: str) -> House:
    house = House()
    listed = git("ls-tree", "-r", "--name-only", commit, *PLACES).splitlines()
    texts = {path: git("show", f"{commit}:{path}") for path in listed if path.endswith(".py")}
    known = {module_of(path) for path in texts}
    for path, text in texts.items():
        house.lines[path] = len(text.splitlines())
        name = module_of(path)
        house.imports |= {(name, other) for other in imported(ast.parse(text), known) if other != name}
    return house


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("commits", nargs="+", metavar="COMMIT")
    commits = parser.parse_args().commits
    houses = [look(commit) for commit in commits]
    facts = {
        "files": [len(house.lines) for house in houses],
        "folders": [len(house.rooms) for house in houses],
        "files in arkv/ itself": [
            sum(path.count("/") == 1 for path in house.lines if path.startswith("arkv/")) for house in houses
        ],
        "lines": [f"{sum(house.lines.values()):,}" for house in houses],
        "imports, file to file": [len(house.imports) for house in houses],
        "files that import each other in a circle": [sum(map(len, house.circles)) for house in houses],
        "files over 400 lines, but for kernels": [
            sum(n > 400 and KERNELS not in path for path, n in house.lines.items()) for house in houses
        ],
        "longest file": [
            "{} ({:,})".format(*max(house.lines.items(), key=lambda each: each[1])) for house in houses
        ],
    }
    names = [git("rev-parse", "--short", commit).strip() for commit in commits]
    print("| |", " | ".join(names), "|\n|---" + "|---" * len(names) + "|")
    for name, values in facts.items():
        print(f"| {name} |", " | ".join(map(str, values)), "|")


if __name__ == "__main__":
    main()
