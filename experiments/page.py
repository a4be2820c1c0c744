"""One HTML page that needs nothing else: texts escaped, pictures inside, no scripts."""

import base64
import html
import pathlib
from collections.abc import Sequence

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
img { max-width: 100%; }
table { border-collapse: collapse; }
th, td { border: 1px solid #ccc; padding: .3rem .6rem; text-align: left; vertical-align: top; }
th { background: #f3f3f3; }
table.texts { table-layout: fixed; width: 100%; }
table.texts td { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .9rem; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; }
"""


def page(title: str, parts: Sequence[str]) -> str:
  """Returns the page of parts, each of them HTML; the title is text."""
  title = html.escape(title)
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width">\n'
    f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
    + "\n".join(parts)
    + "\n</body>\n</html>\n"
  )


def section(title: str, content: str) -> str:
  """Returns content, which is HTML, under a title, which is text."""
  return f"<h2>{html.escape(title)}</h2>\n{content}"


def paragraphs(texts: Sequence[str]) -> str:
  return "\n".join(f"<p>{html.escape(text)}</p>" for text in texts)


def table(rows: Sequence[Sequence[str]], *, kind: str = "numbers") -> str:
  """Returns rows of text as a table, the first its head; `kind` is "numbers" or "texts"."""
  line = lambda cells, mark: "".join(f"<{mark}>{html.escape(cell)}</{mark}>" for cell in cells)
  head, *body = rows
  lines = "\n".join(f"<tr>{line(cells, 'td')}</tr>" for cells in body)
  return (
    f'<table class="{kind}">\n<thead><tr>{line(head, "th")}</tr></thead>\n'
    f"<tbody>\n{lines}\n</tbody>\n</table>"
  )


def code(text: str) -> str:
  return f"<pre>{html.escape(text)}</pre>"


def picture(path: pathlib.Path, caption: str) -> str:
  """Returns a PNG as part of the page."""
  data = base64.b64encode(path.read_bytes()).decode()
  return f'<img alt="{html.escape(caption, quote=True)}" src="data:image/png;base64,{data}">'
