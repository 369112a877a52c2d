"""The reference of all fields of a run and of a fine-tuning, from the models themselves:

    python -m rlzero.config.reference > docs/config.md
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from pydantic import BaseModel

from rlzero.config.read import record_type
from rlzero.config.rl import NOT_CONFIGURED, Config
from rlzero.config.sft import SftConfig

FIELD = re.compile(r"    (\w+): (.+?)(?:  # (.*))?$")
HEAD = """# Every field of a config

Made by `python -m rlzero.config.reference > docs/config.md`; a test repeats it. An unknown field is an error that names
the nearest one, and `--dry-run` prints every field with its value. `rlzero sft` has other defaults of the optimizer:
lr 5e-5, by a cosine to a tenth.
"""


def reference() -> str:
    """The page docs/config.md."""
    parts = [HEAD]
    for title, model, hidden in (
        ("`rlzero train`, `generate`, `eval`", Config, set(NOT_CONFIGURED)),
        ("`rlzero sft`", SftConfig, {"optimizer.total_steps"}),
    ):
        parts.append(f"## {title}\n")
        parts += _sections(model, "", hidden)
    return "\n".join(parts)


def _sections(model: type[BaseModel], name: str, hidden: set[str]) -> Iterator[str]:
    """The table of a section's own fields, then those of the sections in it."""
    inner = {key: record_type(field.annotation) for key, field in model.model_fields.items()}
    dotted = {key: f"{name}.{key}".lstrip(".") for key in inner}
    written = _written(model)
    rows = []
    for key, section in inner.items():
        if section is None and dotted[key] not in hidden:
            declared, meaning = written.get(key, ("", ""))
            default = model.model_fields[key]
            value = "required" if default.is_required() else f"`{default.get_default()!r}`"
            rows.append(f"| `{dotted[key]}` | `{declared}` | {value} | {meaning} |")
    if rows:
        yield "\n".join(["| field | type | default | meaning |", "|---|---|---|---|", *rows, ""])
    for key, section in inner.items():
        if section is not None:
            yield from _sections(section, dotted[key], hidden)


def _written(model: type[BaseModel]) -> dict[str, tuple[str, str]]:
    """Of every field the type as it is written and the comment beside or above it."""
    found: dict[str, tuple[str, str]] = {}
    for base in reversed(model.__mro__):
        above: list[str] = []
        ours = issubclass(base, BaseModel) and base is not BaseModel
        for line in inspect.getsource(base).splitlines() if ours else ():
            if field := FIELD.match(line):
                declared = field[2].split(" = ")[0].replace("|", "\\|")
                found[field[1]] = (declared, (field[3] or " ".join(above)).replace("|", "\\|"))
            above = [*above, line.strip()[2:]] if line.startswith("    # ") else []
    return found


if __name__ == "__main__":
    print(reference(), end="")
