"""`rlzero init`: the configs that are shipped with the package (`rlzero/configs`), written where one can edit them."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from rlzero.config.read import UsageError

FOLDER = Path(__file__).parents[1] / "configs"


def shipped() -> dict[str, str]:
    """Name of every config of a run and the first sentence of its comment. A folder is a config with its own files."""
    files = sorted([*FOLDER.glob("*.yaml"), *FOLDER.glob("*/*.yaml")], key=lambda file: file.stem)
    return {_name(file): _about(file) for file in files}


def init(name: str, folder: Path) -> list[Path]:
    """Writes the config `name`, and the files that stand beside it in its folder, into `folder`; returns their paths,
    the config first. Paths of shipped files (the demo's base) become those of the package. Raises `UsageError` for an
    unknown name and where a file exists."""
    source = next((file for file in FOLDER.rglob("*.yaml") if _name(file) == name), None)
    if source is None:
        known = "".join(f"\n  {name:<16} {about}" for name, about in shipped().items())
        raise UsageError(f"init: no config {name!r} is shipped; there are{known}")
    files = [source] if source.parent == FOLDER else [source, *sorted(set(source.parent.iterdir()) - {source})]
    files = [file for file in files if file.is_file()]
    targets = [folder / file.name for file in files]
    for target in targets:
        if target.exists():
            raise UsageError(f"{target}: exists; go to another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    for file, target in zip(files, targets, strict=True):
        text = file.read_text(encoding="utf-8")
        if file is source:
            text = text.replace("configs/", f"{FOLDER.resolve()}/")
        target.write_text(text, encoding="utf-8")
    return targets


def _name(file: Path) -> str:
    return file.stem if file.parent == FOLDER or file.stem == file.parent.name else f"{file.parent.name}/{file.stem}"


def _about(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").split("\n")
    comment = " ".join(line.lstrip("# ") for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")])
    return textwrap.shorten(re.match(r"(.{12,}?)(?=\. |\.?$)|.*", comment)[0], 100, placeholder=" ...")
