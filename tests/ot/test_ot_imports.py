import ast
import pathlib
import subprocess
import sys

import fs_jax.ot

FOREIGN = "flax optax orbax tensorflow tensorflow_datasets sklearn ott torch matplotlib"


def test_the_package_imports_only_jax():
    program = f"import fs_jax.ot, sys; print(*[name for name in '{FOREIGN}'.split() if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_the_code_needs_only_jax_and_jaxtyping():
    """And what JAX needs. Its folder `testing`, which no other file imports, is not part of this."""
    own = {"fs_jax", "jax", "jaxtyping", "numpy", *sys.stdlib_module_names}
    for path in pathlib.Path(fs_jax.ot.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name}: a relative import"
                names = [str(node.module)]
            assert {name.split(".")[0] for name in names} <= own, f"{path.name} imports {names}"
