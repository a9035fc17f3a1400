"""One module a family of functions, each with a `cases` that builds its rows."""
