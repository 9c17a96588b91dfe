"""A process with a GPU that does not exist: real code on fake CUDA tensors, which have shapes, types and devices only.

`python -m tests.gpu_paths.fake_gpu LIBRARY SCENARIOS` prints what the scenarios did on the GPU, as JSON. LIBRARY is
guard.cpp, compiled; it is loaded before torch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path

if __name__ == "__main__":
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    libraries = Path(found.origin).parent / "lib"
    for library in (*libraries.glob("libgomp*"), libraries / "libc10.so", libraries / "libtorch_cpu.so", sys.argv[1]):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    from tests.gpu_paths.scenarios import main

    main(sys.argv[2])
