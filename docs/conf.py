"""The site: `sphinx-build -W -b html docs docs/_build`. It needs no network.

Docstrings are plain text. Here their code spans become code, their indented formulas TeX where
`formulas` has them (else code), and formulas MathML, which browsers draw by themselves.
"""

import html
import re
import shutil
import sys
import textwrap
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))

from formulas import FORMULAS  # noqa: E402

import bnn  # noqa: E402

project, author, release = "bnn", "the authors of bnn", bnn.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "jupyter_execute"]  # the second is of myst_nb
suppress_warnings = ["myst-nb.lexer"]  # of a notebook that no kernel has saved yet
html_theme = "furo"
html_title = f"bnn {release}"
html_math_renderer = "mathml"
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks are committed with their outputs, and run by the tests
nb_number_source_lines = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_custom_sections = [("Attributes", "params_style")]  # without their types
python_maximum_signature_line_length = 88

tutorials = HERE / "tutorials"
for each in tutorials.glob("*.ipynb"):
    each.unlink()
for each in sorted((HERE.parent / "notebooks").glob("[0-9]*.ipynb")):
    shutil.copy(each, tutorials)


def _leave_out(app, docname, source):
    """A pattern of a toctree that no file matches, which Sphinx would warn of."""
    folder = (HERE / docname).parent
    for line in re.findall(r"^.*\*$", source[0], re.M):
        if re.fullmatch(r"[\w\[\]-]+\*", line) and not list(folder.glob(line)):
            source[0] = source[0].replace(f"{line}\n", "")


def _escaped(text):
    """Prose as reStructuredText: code spans are code, and no other character is markup."""
    parts = re.split(r"(`+[^`]*`+)", text)
    for i, part in enumerate(parts):
        if i % 2:
            code = part.strip("`")
            known = re.fullmatch(r"bnn\.[A-Za-z_.]+", code)
            parts[i] = f":py:obj:`{code}`" if known else f"``{code}``"
        else:
            parts[i] = re.sub(r"([\\*|]|_(?=\W|$))", r"\\\1", part)
    return "".join(parts)


_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Warns|References|Example):$")


def _prepare(app, what, name, obj, options, lines):
    """A docstring of ours as napoleon takes it."""
    text, out, section = [line.rstrip() for line in lines], [], ""
    number = 0
    while number < len(text):
        line = text[number]
        indent = len(line) - len(line.lstrip())
        if _SECTION.match(line):
            section = line[:-1]
            out.append(line)
        elif section == "Example" and (indent or not line):
            out.append(line)
        elif line and not indent:
            section = ""
            out.append(_escaped(line))
        elif indent >= 4 and not section and (not out or not out[-1]):
            block = []
            while number < len(text) and (text[number].startswith("    ") or not text[number]):
                block.append(text[number])
                number += 1
            out += _formula("\n".join(block))
            continue
        elif section in ("Args", "Attributes", "Raises") and (
            found := re.match(r"(    [*\w, ]+: )(.*)", line)
        ):
            out.append(found[1] + _escaped(found[2]))
        elif section == "Returns" and out[-1] == "Returns:":
            out.append(f"    : {_escaped(line).strip()}")  # no type: what stands before a colon
        else:
            out.append(_escaped(line))
        number += 1
    lines[:] = "\n".join(out).split("\n")


def _formula(block):
    block = textwrap.dedent(block).strip("\n")
    tex = FORMULAS.get(block.splitlines()[0].strip())
    if tex is None:
        return ["::", "", textwrap.indent(block, "    "), ""]
    return [".. math::", "", textwrap.indent(tex.strip(), "    "), ""]


def _math(block):
    def visit(self, node):
        tex = re.sub(r"\\[bB]igg?[lrm]?(?![a-zA-Z])", "", node.astext())  # docutils has none
        try:
            drawn = latex2mathml.tex2mathml(tex, as_block=block)
        except MathError as error:
            logger.warning("%s in the formula %s", error, tex, location=node)
            drawn = f"<code>{html.escape(tex)}</code>"
        self.body.append(f'<div class="math">{drawn}</div>' if block else drawn)
        raise nodes.SkipNode

    return visit, None


def setup(app):
    """Adds the steps above."""
    app.connect("source-read", _leave_out)
    app.connect("autodoc-process-docstring", _prepare, priority=100)
    app.add_html_math_renderer("mathml", _math(False), _math(True))
