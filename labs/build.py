"""Build each lab's notebook from its lab.py, or check that none is stale.

  python labs/build.py            # write every labs/*/lab.ipynb
  python labs/build.py --check    # write nothing; exit status 1 if one is missing or stale

A notebook is a function of its lab.py alone: no outputs, cell ids by number, so that a diff shows what changed.
"""

import argparse
import sys
from pathlib import Path

LABS = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebook_of(script: Path) -> str:
    """The notebook of a py:percent script, as JSON text."""
    import jupytext
    import nbformat

    # Comments stay comments: jupytext would make a command of one that begins like a magic.
    form = {"extension": ".py", "format_name": "percent", "comment_magics": False}
    notebook = jupytext.reads(script.read_text(encoding="utf-8"), fmt=form)
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for index, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"{script.parent.name}-{index:02d}", nbformat.from_dict({})
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="write nothing; say which notebooks are stale")
    check = parser.parse_args(argv).check
    try:
        import jupytext  # noqa: F401
    except ImportError:
        print("error: building notebooks needs jupytext: pip install -e '.[dev]'", file=sys.stderr)
        return 2
    stale = []
    for script in sorted(LABS.glob("*/lab.py")):
        path, text = script.with_suffix(".ipynb"), notebook_of(script)
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if check:
            stale.append(path)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    for path in stale:
        print(f"{path} is missing or stale: run python labs/build.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
