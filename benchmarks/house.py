"""The house in numbers, by room: how much is shown, how long it is. `python benchmarks/house.py`

A definition counts as shown when one of the next two code cells, itself not a definition, uses its name.
Lines are non-blank ones; a function's length counts its signature and its docstring.
"""

import ast
import json
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def code_cells(notebook):
    "Sources of the code cells."
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def count_lines(source):
    "Non-blank lines without nbdev's directives."
    return sum(bool(line.strip()) and not line.startswith("#|") for line in source.splitlines())


def defined_in(source):
    "Functions and classes at the top level of a cell."
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [node.name for node in ast.parse(source).body if isinstance(node, kinds)]


def used_in(source):
    "Names and attributes that a cell reads."
    nodes = list(ast.walk(ast.parse(source)))
    names = {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    return names


def find_hidden(notebook):
    "(number of definitions, names of those that the next two code cells do not use)."
    cells, n, hidden = code_cells(notebook), 0, []
    for i, source in enumerate(cells):
        if "#| export" in source:
            names = defined_in(source)
            near = [used_in(s) for s in cells[i + 1 : i + 3] if "#| export" not in s]
            n, hidden = n + len(names), hidden + [name for name in names if not any(name in used for used in near)]
    return n, hidden


def long_functions(module, limit=30):
    "Functions of more lines than `limit`."
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(Path(module).read_text(encoding="utf-8"))) if isinstance(node, kinds)]
    return [
        f"{node.name} ({node.end_lineno - node.lineno + 1})" for node in nodes if node.end_lineno - node.lineno >= limit
    ]


def long_lines(path, limit=120):
    "Lines of more columns than `limit`; of a notebook those of its code cells."
    text = "\n".join(code_cells(path)) if Path(path).suffix == ".ipynb" else Path(path).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if len(line) > limit and not line.startswith("__all__")]


def main():
    total = {"lines": 0, "definitions": 0, "shown": 0}
    print(f"{'room':<14}{'shown':>12}{'notebook':>10}{'module':>8}   functions over 30 lines; hidden definitions")
    for notebook in sorted((PROJECT / "nbs").glob("*.ipynb")):
        module = PROJECT / "ich_fastai" / f"{notebook.stem.partition('_')[2]}.py"
        n, hidden = find_hidden(notebook)
        lines = count_lines(module.read_text(encoding="utf-8"))
        shown = f"{n - len(hidden)}/{n} {100 * (n - len(hidden)) / max(1, n):3.0f}%"
        notes = "; ".join(", ".join(names) for names in (long_functions(module), hidden) if names)
        print(f"{notebook.stem:<14}{shown:>12}{sum(map(count_lines, code_cells(notebook))):>10}{lines:>8}   {notes}")
        for key, value in (("lines", lines), ("definitions", n), ("shown", n - len(hidden))):
            total[key] += value
    n, k = total["definitions"], total["shown"]
    print(f"all: {k} of {n} definitions shown, {100 * k / n:.0f}%; {total['lines']:,} lines in the package")


if __name__ == "__main__":
    main()
