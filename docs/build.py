"""Build the API documentation with pdoc, in seconds: `python docs/build.py [FOLDER]`, by default to build/docs.

pdoc is the simplest generator that fits: it renders the docstrings as they are (Google style, Markdown, doctests) to
static pages, without a configuration. The page of a package starts with its README.md. Warnings and links to missing
pages are errors.
"""

import importlib
import pathlib
import re
import sys
import warnings

import pdoc

import fs_jax

# pdoc documents the modules in the `__all__` of fs_jax. The other ones here are public, too.
MODULES = (
    "fs_jax", "fs_jax.data.augmentation", "fs_jax.evaluation.gradient_masking", "fs_jax.models.convert",
    "fs_jax.ot.testing", "fs_jax.training.methods",
    # Excluded: modules with the same name as a function, which is documented in its package.
    "!fs_jax.attacks.", "!fs_jax.ot.(?!testing)", "!fs_jax.training.methods.",
)  # fmt: skip


def main(folder: pathlib.Path) -> None:
    """Write all pages to the folder."""
    warnings.filterwarnings("error", module="pdoc")
    for page in sorted(pathlib.Path(fs_jax.__file__).parent.glob("*/README.md")):
        package = importlib.import_module(f"fs_jax.{page.parent.name}")
        package.__doc__ = f"{package.__doc__}\n\n{for_pdoc(page.read_text(encoding='utf-8'))}"
    # The template directory contains custom.css.
    pdoc.render.configure(docformat="google", template_directory=pathlib.Path(__file__).parent)
    pdoc.pdoc(*MODULES, output_directory=folder)
    check_links(folder)
    print(folder / "index.html")


def for_pdoc(markdown: str) -> str:
    """Replace links to READMEs of packages by links to their pages, and links to other files by their text."""
    markdown = re.sub(r"\]\(\.\./(\w+)/README\.md(#[\w-]*)?\)", r"](\1.html\2)", markdown)
    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:|#|\w+\.html)[^)]*\)", r"\1", markdown)


def check_links(folder: pathlib.Path) -> None:
    """Raise an error unless all relative links and images exist."""
    for page in folder.rglob("*.html"):
        for link in re.findall(r'(?:href|<img src)="([^"#]+)', page.read_text(encoding="utf-8")):
            if not re.match(r"https?:|data:|\$", link) and not (page.parent / link).exists():
                raise FileNotFoundError(f"{page}: expected an existing page or image; got {link}.")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if sys.argv[1:] else "build/docs"))
