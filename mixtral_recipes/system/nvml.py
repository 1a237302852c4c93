"""NVIDIA's management library, which comes with the driver: what GPUs a process may use, without importing torch.

Inside a container /proc lists the GPUs of its host, used or not, and under WSL none. This library is there exactly if
GPUs are, and counts those that the container or the job was given.
"""

import ctypes
from functools import cache

_NAME_BYTES = 96


@cache
def names() -> tuple[str, ...] | None:
    """What the driver calls each GPU, ``NVIDIA H100 80GB HBM3``; None where the library is not, or cannot start."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if library.nvmlInit_v2():
        return None
    try:
        count = ctypes.c_uint()
        if library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return None
        return tuple(_name(library, index) for index in range(count.value))
    finally:
        library.nvmlShutdown()


def _name(library: ctypes.CDLL, index: int) -> str:
    device, text = ctypes.c_void_p(), ctypes.create_string_buffer(_NAME_BYTES)
    failed = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device))
    failed = failed or library.nvmlDeviceGetName(device, text, ctypes.c_uint(_NAME_BYTES))
    return "" if failed else text.value.decode()
