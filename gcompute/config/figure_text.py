"""Text of a user's own in a figure: matplotlib would set what is between two dollar signs as a formula."""


def figure_text(text: str) -> str:
    r"""`text` so that matplotlib shows it as it is.

    >>> print(figure_text("runs/$^$"))
    runs/\$^\$
    """
    # Half a surrogate pair stands for a byte of a file name that is not UTF-8, and no font has it.
    return text.encode("utf-8", errors="replace").decode("utf-8").replace("$", r"\$")
