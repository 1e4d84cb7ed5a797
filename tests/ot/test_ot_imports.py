import subprocess
import sys

FOREIGN = "flax optax orbax tensorflow tensorflow_datasets sklearn ott torch matplotlib"


def test_the_package_imports_only_jax():
    program = f"import fs_jax.ot, sys; print(*[name for name in '{FOREIGN}'.split() if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
