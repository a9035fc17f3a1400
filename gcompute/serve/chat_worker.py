"""The process in which chat templates run: bounded memory, JSON lines in and out, jinja2 and no JAX.

    {"templates", "special", "memory_bytes"}            ->  {"names": {template: [variables that it reads]}}
    {"template", "variables", "time_s", "max_chars"}    ->  {"text", "spans"} or {"error"}

A template is a program of someone else's: its loops may not end and its strings may not fit.
"""

import json
from datetime import datetime
from functools import partial
from typing import Any, ClassVar

import jinja2  # pyright: ignore[reportMissingImports]
from jinja2 import meta, nodes  # pyright: ignore[reportMissingImports]
from jinja2.ext import Extension  # pyright: ignore[reportMissingImports]
from jinja2.filters import do_join  # pyright: ignore[reportMissingImports]
from jinja2.sandbox import ImmutableSandboxedEnvironment  # pyright: ignore[reportMissingImports]
from jinja2.visitor import NodeTransformer  # pyright: ignore[reportMissingImports]

from gcompute.serve.chat_text import Text, formatted, joined, received, spans, written
from gcompute.serve.line_worker import answer_lines, bound_memory

LITERAL, CONCAT = "_own_{}", "_own_joined"


class Generation(Extension):
    """What lies between `generation` and `endgeneration`, which matters to who trains on it, as it is."""

    tags: ClassVar[set[str]] = {"generation"}  # pyright: ignore[reportIncompatibleVariableOverride]

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Environment(ImmutableSandboxedEnvironment):
    """jinja's sandbox as transformers sets it up, with text that knows its origin."""

    concat = staticmethod(joined)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
        self.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        self.globals[CONCAT] = lambda *parts: joined(parts)
        self.filters |= {"tojson": _to_json, "join": _join}

    def getattr(self, obj: Any, attribute: str) -> Any:
        found = super().getattr(obj, attribute)
        # Where it is the sandbox's own, and not `str.format`, which reads any attribute.
        guarded = attribute == "format" and isinstance(obj, Text) and not hasattr(found, "__self__")
        return partial(formatted, obj, found) if guarded else found

    def compiled(self, source: str) -> tuple[jinja2.Template, list[str]]:
        """A template whose literals are known to be its own, and the variables that it reads."""
        # Looking for variables folds constants where they stand.
        names = sorted(meta.find_undeclared_variables(self.parse(source)))
        literals = _Literals()
        code = self.compile(literals.visit(self.parse(source)))
        return self.template_class.from_code(self, code, self.make_globals(literals.values)), names


class _Literals(NodeTransformer):
    """Puts a variable in the place of every literal string, and a function in that of `~`."""

    def __init__(self) -> None:
        self.values: dict[str, Text] = {}

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        return self._named(node.value, node) if isinstance(node.value, str) else node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return self._named(node.data, node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        function = nodes.Name(CONCAT, "load", lineno=node.lineno)
        return nodes.Call(function, node.nodes, [], None, None, lineno=node.lineno)

    def _named(self, text: str, node: nodes.Node) -> nodes.Node:
        name = LITERAL.format(len(self.values))
        self.values[name] = written(text)
        return nodes.Name(name, "load", lineno=node.lineno)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@jinja2.pass_eval_context
def _join(context: Any, value: Any, d: str = "", attribute: Any = None) -> Any:
    return do_join(context, value, Text(d), attribute)


class Templates:
    """The templates of one tokenizer. special: the special tokens that they know by name, such as bos_token."""

    def __init__(self, sources: dict[str, str], special: dict[str, str]):
        environment = Environment()
        self._special = {name: written(token) for name, token in special.items()}
        self._compiled = {name: environment.compiled(source) for name, source in sources.items()}
        self.names = {name: names for name, (_, names) in self._compiled.items()}

    def render(self, name: str, variables: dict[str, Any]) -> str:
        values = received(variables)
        for message in values["messages"]:
            # One of the few that the server knows.
            message["role"] = written(message["role"])
        return self._compiled[name][0].render(**{**self._special, **values})


def main() -> None:
    """Answer lines until the input ends."""
    made: list[Templates] = []

    def start(first: dict[str, Any]) -> dict[str, Any]:
        bound_memory(first["memory_bytes"])
        made.append(Templates(first["templates"], first["special"]))
        return {"names": made[0].names}

    def render(question: dict[str, Any]) -> dict[str, Any]:
        text = made[0].render(question["template"], question["variables"])
        if len(text) > question["max_chars"]:
            return {"error": f"it makes {len(text):,} characters; the most is {question['max_chars']:,}"}
        return {"text": text, "spans": spans(text)}

    answer_lines(start, render)


if __name__ == "__main__":
    main()
