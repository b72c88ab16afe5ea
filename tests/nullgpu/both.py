"""What the tests in this folder look at, as JSON. One process finds all of it, because imports take most of its time.

python tests/nullgpu/stand_in.py tests/nullgpu/both.py FOLDER ATTENTION…
"""

import json
import sys
from pathlib import Path

from nullgpu.kernels import compile_all
from nullgpu.limits import try_all
from nullgpu.live_bytes import measure_all
from nullgpu.waits import prepare, train_all

folder, *attention = sys.argv[1:]
found = {"live bytes": measure_all(attention, documents=2, layers=2)}
prepare(Path(folder))
found |= {"limits": try_all(Path(folder)), "waits": train_all(Path(folder)), "kernels": compile_all()}
print(json.dumps(found))
