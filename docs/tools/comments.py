"""An extension of griffe, for docstrings as they are written here: no empty line between sections,
and a field's comment, in front of it or behind it, is what documents it.
"""

import io
import re
import tokenize

import griffe

SECTION = re.compile(r"(?<!\n)\n(?= *(?:Args|Raises|Returns):$)", re.M)


class Comments(griffe.Extension):
    """Docstrings as griffe's parser wants them."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Called when griffe has read anything."""
        if obj.docstring:
            obj.docstring.value = SECTION.sub("\n\n", obj.docstring.value)

    def on_class_members(self, *, cls: griffe.Class, **_) -> None:
        """Called when griffe has read a class."""
        fields = [
            member
            for member in cls.members.values()
            if member.is_attribute and member.annotation and "property" not in member.labels
        ]
        if not fields or not cls.docstring or re.search(r"^ *A\w+:$", cls.docstring.value, re.M):
            return  # where there are "Args:" or "Attributes:", they tell of the fields
        comments, alone = _comments("\n".join(cls.lines_collection[cls.filepath]))
        lines = ["", "", "Attributes:"]
        for field in fields:
            first = field.lineno
            while first - 1 in alone:
                first -= 1
            found = [comments.get(line, "") for line in range(first, field.endlineno + 1)]
            text = " ".join(filter(None, found))
            if field.value is not None and "(" not in str(field.value):
                text = f"{text}{'.' * bool(text)} Default: `{field.value}`".strip()
            lines.append(f"  {field.name}: {text}")
        cls.docstring.value += "\n".join(lines)


def _comments(source: str) -> tuple[dict[int, str], set[int]]:
    """{line: comment}, and the lines that have nothing else."""
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    return comments, alone
