"""Write the report of a run as one self-contained HTML file and as Markdown."""

import dataclasses
from pathlib import Path
from typing import Any

import jinja2

from longrope.files import content_of, read_json, write_atomically
from longrope.labels import RESULT
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
    lines = [f"# {content['title']}", "", *(f"- {line}" for line in content["headline"]), ""]
    for section in content["sections"]:
        lines += [f"## {section.title}", ""]
        lines += [line for text in section.text for line in (text, "")]
        for picture in section.figures:
            lines += [f"![{picture.caption}](images/{picture.file})", ""]
        for table in section.tables:
            lines.append(f"| {' | '.join(table.header)} |")
            lines.append("|" + "---|" * len(table.header))
            lines += [f"| {' | '.join(row)} |" for row in table.rows] + [""]
        if section.code:
            lines += ["```", section.code.rstrip(), "```", ""]
    return "\n".join(lines)
