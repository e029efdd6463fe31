#!/bin/bash
# jaxtyping 0.3.11's import hook with beartype 0.23.1 on a module that subclasses flax 0.12.8's Dense: the module cannot
# be imported, though no line of it is about the parameter that the error names.
#
# A subclass of a flax module is a dataclass without saying so, and the hook checks the fields of dataclasses, inherited
# ones too. `nn.Dense.promote_dtype` is typed by the protocol PromoteDtypeFn, which is not runtime_checkable, and which
# beartype therefore refuses. A direct subclass of nn.Module imports.
# `typing.runtime_checkable(flax.linen.linear.PromoteDtypeFn)` before the import mends it.
# Status: 0 while it is so, 1 when it has changed.
set -euo pipefail
PYTHON=${PYTHON:-python3}
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
"$PYTHON" -m pip install -qq --disable-pip-version-check --no-warn-conflicts --target "$T/lib" \
    flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 jaxtyping==0.3.11 beartype==0.23.1
printf 'import flax.linen as nn\n\n\nclass Own(nn.Module):\n    width: int\n' > "$T/own.py"
printf 'import flax.linen as nn\n\n\nclass Linear(nn.Dense):\n    pass\n' > "$T/dense.py"
cat > "$T/load.py" <<'PY'
import importlib
import sys
import typing

import jaxtyping
from flax.linen import linear

how, name = sys.argv[1:]
if how == "mended":
    typing.runtime_checkable(linear.PromoteDtypeFn)
try:
    with jaxtyping.install_import_hook([name], "beartype.beartype"):
        importlib.import_module(name)
    print(how, name, "imported")
except Exception as error:
    print(how, name, type(error).__name__)
PY
for how in "plain own" "plain dense" "mended dense"; do
    PYTHONPATH="$T/lib:$T" JAX_PLATFORMS=cpu "$PYTHON" "$T/load.py" $how 2>/dev/null | tee -a "$T/seen"
done
printf 'plain own imported\nplain dense BeartypeDecorHintPep3119Exception\nmended dense imported\n' |
    cmp -s - "$T/seen" || { echo "CHANGED"; exit 1; }
echo "as found: a checked module with a subclass of nn.Dense cannot be imported until an inherited protocol is runtime_checkable"
