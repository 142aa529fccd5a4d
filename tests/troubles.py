"""`python -m tests.troubles` makes docs/troubles.md from the tests of troubles: what may be wrong, what happens then.

The first line of the docstring of such a test is `situation | what happens now`.
"""

import ast
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "troubles.md"
HEAD = """# Troubles

What may be wrong with images, settings and machines, and what Troodon does then. Each row is a test of the suite, and
this page is made from their descriptions: `python -m tests.troubles`.
"""


def sections() -> dict[str, list[tuple[str, str]]]:
    """Rows of situation and what happens, by what their files are about. ValueError for a test that says neither."""
    found = {}
    for path in sorted(TESTS.glob("test_troubles_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        title = (ast.get_docstring(tree) or path.stem).splitlines()[0].rstrip(".")
        found[title] = [
            row(node, path) for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        ]
    return found


def row(test: ast.FunctionDef, path: Path) -> tuple[str, str]:
    first = (ast.get_docstring(test) or "").partition("\n\n")[0]
    situation, bar, now = " ".join(first.split()).partition(" | ")
    if not bar:
        raise ValueError(f"{path.name}, {test.name}: its docstring has no `situation | what happens now`")
    return situation.rstrip("."), now.rstrip(".")


def page() -> str:
    """docs/troubles.md."""
    parts = [HEAD]
    for title, rows in sections().items():
        lines = [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in rows]
        parts.append("\n".join([f"## {title}\n", "| situation | what happens |", "|---|---|", *lines]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
