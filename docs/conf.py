"""Configure Sphinx. `make docs` builds the documentation offline; a warning fails the build."""

from __future__ import annotations

import ast
import inspect
import os
import pkgutil
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

import implicitvi

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).parents[1]
# "full" runs the examples as they are, "smoke" at tiny sizes, "off" not at all
GALLERY = os.environ.get("DOCS_GALLERY", "full")
ONLINE = os.environ.get("DOCS_ONLINE") == "1"
logger = logging.getLogger(__name__)

project = "implicitvi"
author = "The implicitvi authors"
copyright = author
release = version = implicitvi.__version__
language = "en"
exclude_patterns = ["_build", "gallery/GALLERY_HEADER.rst"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]

# prose
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist"]
templates_path = ["_templates"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# reference
default_role = "py:obj"
autosummary_generate = True
autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
add_module_names = False
toc_object_entries_show_parents = "hide"

# Nothing is fetched unless asked for: the build has to work without a network.
intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "pyro": ("https://docs.pyro.ai/en/stable", None),
        "arviz": ("https://python.arviz.org/en/stable", None),
    }
    if ONLINE
    else {}
)

# look
html_theme = "furo"
html_title = f"implicitvi {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
html_show_sphinx = False


def example_arguments(gallery: Any, script: dict[str, Any]) -> list[str]:
    """Return the command line of an example, and restore its docstring, of which argparse shows a part."""
    source = Path(script["src_file"]).read_text(encoding="utf-8")
    script["example_globals"]["__doc__"] = ast.get_docstring(ast.parse(source), clean=False)
    output = ["--output", str(Path(__file__).parent / "_build" / "figures")]
    short = ["--paper", "none"] if Path(script["src_file"]).name.startswith("01_") else []
    return [*output, *short, *(["--smoke"] if GALLERY == "smoke" else [])]


sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/\d\d_",
    "within_subsection_order": "FileNameSortKey",
    "plot_gallery": GALLERY != "off",
    "reset_argv": "conf.example_arguments",
    "reset_modules": ("matplotlib",),
    "parallel": int(os.environ.get("DOCS_JOBS", "1")),
    "doc_module": ("implicitvi",),
    "reference_url": {"implicitvi": None},
    "backreferences_dir": "gallery/backreferences",
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "remove_config_comments": True,
    "min_reported_time": 1,
}


# pages made of results files: their titles, and the commands that measured them
RESULTS = {
    "accuracy": ("Every posterior of the suite", "make accuracy", "../images/accuracy.png"),
    "accuracy-brief": ("The suite in brief", "make accuracy", None),
    "diagnose": ("How often a report is right", "make diagnose-rates", None),
    "conjugate": ("Where the posterior is known", "make conjugate", None),
    "refinement": ("What refinement does", "make refinement", None),
    "bench": ("Time and memory of a step", "make bench", "../images/bench.png"),
    "vae": ("Latent variable models", "make accuracy-vae", None),
    "vae-bench": ("Time of latent variable models", "make bench-vae", None),
}


def give_title(app: Sphinx, docname: str, source: list[str]) -> None:
    """Add a title and the command that measures it to a file of results, which is a bare table."""
    folder, _, name = docname.rpartition("/")
    if folder == "results" and not source[0].startswith("# "):
        title, command, picture = RESULTS.get(name, (name.replace("-", " ").capitalize(), None, None))
        by = f"Measured by `{command}`.\n\n" if command else ""
        shown = f"![{title}]({picture})\n\n" if picture else ""
        source[0] = f"# {title}\n\n{by}{source[0]}\n\n{shown}"


def find_by_name(app: Sphinx, env: Any, node: Any, content: nodes.TextElement) -> Any:
    """Resolve a name such as `Schedule` in a docstring to the one object of that name, if exactly one exists."""
    if node.get("refdomain") != "py":
        return None
    domain = env.get_domain("py")
    found = domain.find_obj(env, None, None, node["reftarget"], None, 1)
    if len(found) != 1:
        return None
    name, entry = found[0]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, name)


def keep_formulas(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Show formulas, the indented paragraphs before the first section of a docstring, as they are written."""
    sections = (i for i, line in enumerate(lines) if re.fullmatch(r"[A-Z][a-z]+:", line))
    end = next(sections, len(lines))
    written: list[str] = []
    for line in lines[:end]:
        said = [each for each in written if each.strip()]
        begins = line.startswith("    ") and said and not written[-1].strip()
        if begins and not said[-1].startswith("    ") and not said[-1].endswith("::"):
            written += ["::", ""]
        written.append(line)
    lines[:end] = written


def exported() -> dict[str, list[tuple[str, str]]]:
    """Return the full name and first line of every object that a package exports, by package."""
    packages = {"implicitvi": implicitvi} | {
        info.name: import_module(info.name)
        for info in pkgutil.walk_packages(implicitvi.__path__, "implicitvi.")
        if info.ispkg
    }
    return {
        name: [described(getattr(package, each)) for each in package.__all__]
        for name, package in packages.items()
        if hasattr(package, "__all__")
    }


def described(value: Any) -> tuple[str, str]:
    """Return the full name of an object, in the module that defines it, and the first line of its docstring."""
    return f"{value.__module__}.{value.__qualname__}", inspect.getdoc(value).splitlines()[0]


def public_objects() -> set[str]:
    """Return the full names of the public classes and functions of every module."""
    names = set()
    for info in pkgutil.walk_packages(implicitvi.__path__, "implicitvi."):
        if info.name == "implicitvi.__main__":  # a program
            continue
        module = import_module(info.name)
        names |= {
            f"{info.name}.{name}"
            for name, value in vars(module).items()
            if (inspect.isclass(value) or inspect.isfunction(value))
            and value.__module__ == info.name
            and not name.startswith("_")
        }
    return names


def check_coverage(app: Sphinx, env: Any) -> None:
    """Warn, and so fail the build, about every public object that the reference lacks."""
    known = env.get_domain("py").objects
    for name in sorted(public_objects() - known.keys()):
        logger.warning("The API reference lacks %s. Add its module to reference/api.md.", name)


autosummary_context = {"exported": exported()}


def name_defaults(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: Any
) -> tuple[str, Any] | None:
    """Show a default that is a class by its name: Sphinx cannot parse a signature with ``<class …>`` in it."""
    if signature is None:
        return None
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", signature), returns


def setup(app: Sphinx) -> None:
    """Connect the functions above to the events of Sphinx."""
    app.connect("source-read", give_title)
    app.connect("autodoc-process-docstring", keep_formulas, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", name_defaults)
    app.connect("missing-reference", find_by_name)
    app.connect("env-check-consistency", check_coverage)
