"""The site: sphinx-build -W -b html docs docs/_build/html"""

import shutil
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

import cpunorm

project = "cpunorm"
author = "the cpunorm developers"
release = cpunorm.__version__
exclude_patterns = ["_build"]
templates_path = ["_templates"]

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
default_role = "py:obj"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the docstrings say more
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
numpydoc_show_class_members = False  # the template does
numpydoc_validation_checks = {"all", "ES01", "EX01", "SA01", "YD01"}  # all but these

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"cpunorm {release}"
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False


def mathml(block):
    """Return what writes a formula as MathML: browsers draw it with no script and no network."""

    def visit(self, node):
        self.body.append(tex2mathml(node.astext(), as_block=block))
        raise SkipNode

    return visit, None


def copy_explorer(app, exception):
    """The interactive page of the maps is a page of its own, beside its script."""
    if exception is None and app.builder.format == "html":
        for name in ("explore.html", "plotly-basic.min.js"):
            source = Path(app.srcdir, "maps", name)
            if source.exists():
                (Path(app.outdir) / "maps").mkdir(exist_ok=True)
                shutil.copy(source, Path(app.outdir, "maps", name))


def setup(app):
    app.connect("build-finished", copy_explorer)
    app.add_html_math_renderer("mathml", mathml(block=False), mathml(block=True))
