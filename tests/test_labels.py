"""Names in Markdown: a parser gives back what a user's file is called."""

import html

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from longrope.labels import as_markdown

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
SPECIAL = st.sampled_from("\\`*_[]<>|~$#&!()-+=.:1a b\n")
ANY = st.characters(exclude_categories=["Cc", "Cs"])


@given(text=st.text(SPECIAL | ANY, max_size=30).map(lambda text: f"a{text}b"))
def test_text_stays_as_it_is(text):
    shown = html.escape(" ".join(text.split()), quote=False).replace('"', "&quot;")
    text = as_markdown(text)
    assert PARSER.render(f"# {text}") == f"<h1>{shown}</h1>\n"
    assert f"<td>{shown}</td>\n<td>2</td>" in PARSER.render(f"|x|y|\n|---|---|\n| {text} | 2 |")
    assert f'alt="{shown}"' in PARSER.render(f"![{text}](images/x.png)")


@pytest.mark.parametrize("name", ["[x](https://x)", "<script>", "a | b", "`x`", "**x**", "&lt;"])
def test_examples(name):
    assert html.escape(name, quote=False) in PARSER.render(f"# {as_markdown(name)}")
