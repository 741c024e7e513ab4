"""Write the report of a run as one self-contained HTML file and as Markdown."""

import dataclasses
from pathlib import Path
from typing import Any

import jinja2

from longrope.files.atomic import write_atomically
from longrope.files.parse import content_of, read_json
from longrope.labels import RESULT, as_markdown
from longrope.report import plots
from longrope.report.headline import headline
from longrope.report.sections import Section, all_sections


def write_page(directory: Path) -> list[Path]:
    """Write ``report.html``, ``report.md`` and ``images/`` of a run, and return both report files.

    Raises:
        ValueError: ``directory`` holds no evaluated run.
    """
    file = directory / "results.json"
    if not file.exists():
        raise ValueError(f"{directory}: no results.json; finish 'longrope extend' first")
    results = read_json(file)
    with content_of(file, "run the same 'longrope extend' again"):
        title = (
            f"{results['model']}: {results['original_length']:,} → {results['target']:,} tokens "
            f"({results['target'] / results['original_length']:g}×)"
        )
        sections = [_drawn(section, directory) for section in all_sections(directory, results)]
        content = {"title": title, "headline": headline(results), "sections": sections}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True
    )
    page = environment.get_template("page.html.j2").render(content, result=RESULT)
    write_atomically(directory / "report.html", page)
    write_atomically(directory / "report.md", _markdown(content))
    return [directory / "report.html", directory / "report.md"]


def _drawn(section: Section, directory: Path) -> Section:
    """Return a section for the page, with its figures as SVG; save them as PNG for the Markdown."""
    pictures = []
    for picture in section.figures:
        pictures.append(dataclasses.replace(picture, svg=plots.to_svg(picture.figure)))
        plots.save_figure(picture.figure, directory / "images" / picture.file)
    return dataclasses.replace(section, figures=pictures)


def _markdown(content: dict[str, Any]) -> str:
    lines = [f"# {as_markdown(content['title'])}", ""]
    lines += [*(f"- {as_markdown(line)}" for line in content["headline"]), ""]
    for section in content["sections"]:
        lines += [f"## {as_markdown(section.title)}", ""]
        lines += [line for text in section.text for line in (as_markdown(text), "")]
        for picture in section.figures:
            lines += [f"![{as_markdown(picture.caption)}](images/{picture.file})", ""]
        for table in section.tables:
            head, *rows = [
                f"| {' | '.join(map(as_markdown, row))} |" for row in (table.header, *table.rows)
            ]
            lines += [head, "|" + "---|" * len(table.header), *rows, ""]
        if section.code:
            fence = "```"
            while fence in section.code:
                fence += "`"
            lines += [fence, section.code.rstrip(), fence, ""]
    return "\n".join(lines)
