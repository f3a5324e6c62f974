"""Lists the commands: python -m ngpt_jax"""

import ast
from pathlib import Path

_COMMANDS = ("main", "tools/*", "data/prepare", "data/train_tokenizer", "data/corpora")


def commands() -> dict[str, str]:
    """Name of each command's module, and the first line of its docstring."""
    root, out = Path(__file__).parent, {}
    for pattern in _COMMANDS:
        for file in sorted(root.glob(f"{pattern}.py")):
            if file.stem != "__init__":
                name = ".".join(file.relative_to(root.parent).with_suffix("").parts)
                first = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
                out[name] = first.splitlines()[0]
    return out


def main() -> None:
    found = commands()
    width = max(map(len, found))
    print("Commands of ngpt_jax; each has --help with examples:\n")
    for name, line in found.items():
        print(f"  python -m {name:<{width}}  {line}")


if __name__ == "__main__":
    main()
