"""The pages of docs/: every metric is explained, every link leads somewhere."""

import re
from pathlib import Path

import pytest

from rlzero.report.log import read_lines

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def explained(page: Path) -> re.Pattern:
    """A pattern for the names in the first column of a page's tables; `<n>` is a number, `<name>` anything."""
    cells = [line.split("|")[1] for line in page.read_text().split("\n") if line.startswith("| `")]
    names = [re.escape(name) for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    wild = {"<n>": r"\d+", "<name>": r"\w+", "<metric>": ".+"}
    return re.compile("|".join(re.sub("<.*?>", lambda found: wild[found[0]], name) for name in names))


def test_every_name_that_runs_write_stands_in_the_page_of_metrics(finished):
    known = explained(ROOT / "docs" / "metrics.md")
    lines = [line for file in ("metrics.jsonl", "evals.jsonl") for line in read_lines(finished / file)]
    written = {name for line in lines for name in line}
    assert len(written) > 50 and [name for name in sorted(written) if not known.fullmatch(name)] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_links_and_named_pages_are_there(page):
    text = page.read_text()
    links = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    missing += [name for name in re.findall(r"`((?:docs|configs|rlzero|rewards|rollout|trainer)/[\w./-]+\.\w+)`", text)
                if not (ROOT / name).exists()]  # fmt: skip
    assert missing == []
